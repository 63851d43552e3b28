"""A written checkpoint, loaded by plain transformers, loses what the simulated pruning of the whole one does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from deleted import log_probabilities, loss_and_kl
from families import SWEEP, Float64Throughout, build, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.demo import CHECKPOINT
from audit.engine.validate import validate
from audit.models import ModelError, prepare
from audit.pruning import PrunedForward, prune_by_metric, write_pruned

GROUPED: dict[str, Any] = {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
NAMED = ["olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss"]
CASES = [
    *(pytest.param(f, {}, id=f, marks=() if f in NAMED else pytest.mark.full) for f in SWEEP),
    pytest.param("deepseek_v2", GROUPED, id="deepseek_v2 with groups"),
    pytest.param("olmoe", {"tie_word_embeddings": True}, id="olmoe with tied embeddings"),
]


def _save(folder: Path, family: str, **options: Any) -> str:
    build(family, dtype=torch.float32, **options).save_pretrained(folder)
    return str(folder)


def _loaded(folder: str | Path) -> Any:
    """By plain transformers. Some routers stay float32 whatever is asked for; float64 everywhere leaves no rounding."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    return module.to(torch.float64)


def _metrics(layers: list[int], experts: int = 8) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"layer": layer, "expert": e, "metric": "reap", "value": rng.normal(), "orientation": 1}
            for layer in layers
            for e in range(experts)
        ]
    )


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_checkpoint_loses_what_the_simulation_does(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source, out = _save(tmp_path / "whole", family, **options), tmp_path / "pruned"
    model = validate(prepare(_loaded(source)))
    report = prune_by_metric(source, _metrics(list(model.sites)), "reap", keep=4, out=out)
    removed = {layer: [e for e in range(8) if e not in kept] for layer, kept in report.kept.items()}
    assert set(removed) == set(model.sites)
    assert all(len(experts) == 4 for experts in removed.values())

    pruned = _loaded(out)
    assert type(pruned) is type(model.module)
    ids = [torch.from_numpy(s.token_ids) for s in texts((24, 11))]
    with Float64Throughout():
        forward = PrunedForward(model, ids)
        found = forward.outcomes(removed)
    with model.own_attention():
        clean = [log_probabilities(model.module, s) for s in ids]
    exact = [loss_and_kl(c, log_probabilities(pruned, s), s) for c, s in zip(clean, ids, strict=True)]
    loss, kl = (torch.cat(column) for column in zip(*exact, strict=True))
    torch.testing.assert_close(forward.baseline_loss_M + found.delta_loss, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.kl, kl, rtol=1e-7, atol=1e-12)
    assert kl.mean() > 1e-4

    files = [path.name for path in out.iterdir()]
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert "model.safetensors" in files
    on_disk = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert report.bytes_after == pytest.approx(on_disk, rel=0.05)  # the rest is the files' headers
    assert report.bytes_after < report.bytes_before


def test_the_best_are_kept_and_the_readme_says_so(tmp_path: Path) -> None:
    source, metrics = _save(tmp_path / "whole", "olmoe"), _metrics([0, 1, 2, 3])
    report = prune_by_metric(source, metrics, "reap", keep=3, out=tmp_path / "pruned")
    for layer, rows in metrics.groupby("layer"):
        assert set(report.kept[layer]) == set(rows.nlargest(3, "value")["expert"])
    assert report.config_changes["num_experts"] == (8, 3)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_experts"] == 3
    assert config["num_experts_per_tok"] == 2
    assert (tmp_path / "pruned" / "generation_config.json").is_file()
    readme = (tmp_path / "pruned" / "README.md").read_text()
    for said in ("keeps 3 of 8 routed experts", "`reap`", "| `num_experts` | 8 | 3 |", source, "no tokenizer"):
        assert said in readme
    assert f"| 2 | {', '.join(map(str, report.kept[2]))} |" in readme
    # Nothing is left beside it.
    assert sorted(os.listdir(tmp_path)) == ["pruned", "whole"]


def test_the_demo_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    experts = config["num_experts"]
    removed = {layer: range(experts // 2) for layer in range(config["num_hidden_layers"])}
    report = write_pruned("demo", removed, out=tmp_path)  # an empty folder that exists
    assert report.kept[0] == tuple(range(experts // 2, experts))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    original = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "def double(x):\n    return 2 * x\n"
    assert tokenizer(text).input_ids == original(text).input_ids


def test_groups_keep_the_best_of_each(tmp_path: Path) -> None:
    source, metrics = _save(tmp_path / "whole", "deepseek_v3"), _metrics([1, 2, 3])
    report = prune_by_metric(source, metrics, "reap", keep=4, out=tmp_path / "pruned")
    for layer, rows in metrics.groupby("layer"):
        best = [rows[rows["expert"] // 4 == group].nlargest(2, "value")["expert"] for group in (0, 1)]
        assert report.kept[layer] == tuple(sorted([*best[0], *best[1]]))


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    plain, grouped = _save(tmp_path / "plain", "olmoe"), _save(tmp_path / "grouped", "deepseek_v3")
    every, moe, out = dict.fromkeys(range(4), (0, 1)), dict.fromkeys(range(1, 4), (0, 1)), tmp_path / "out"
    for source, removed, sentence in [
        (plain, {0: (0, 1)}, r"removed: layers would keep 6 to 8 experts; a configuration names one number"),
        (plain, dict.fromkeys(range(4), range(7)), r"keep: 1 of 8 experts is not possible, a token is routed to 2; ch"),
        (plain, every | {7: (0, 1)}, r"removed: layers \[7\] have no routed experts"),
        (plain, every | {0: (0, 9)}, r"removed: layer 0 has no experts \[9\]; it has 0 to 7"),
        (plain, {}, r"keep: 8 of 8 experts is not possible"),
        (grouped, moe, r"removed: the expert groups of layer 1 would keep \[2, 4\] experts"),
        (grouped, dict.fromkeys(range(1, 4), (0, 1, 4)), r"keep: 5 experts cannot form 2 groups.*multiple of 2"),
        (grouped, {0: (1,)}, r"removed: layers \[0\] have no routed experts; those that have are \[1, 2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            write_pruned(source, removed, out=out)
    with pytest.raises(ValueError, match=r"metrics: 'reap' has no values in layer 2"):
        prune_by_metric(plain, _metrics([0, 1]), "reap", keep=4, out=out)
    with pytest.raises(ModelError, match=r"model\.source: .* holds no config\.json"):
        write_pruned(str(tmp_path), every, out=out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"out: .* is not empty"):
        write_pruned(plain, every, out=tmp_path / "plain")


def test_a_checkpoint_that_does_not_come_back_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _save(tmp_path / "whole", "olmoe")
    own = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: a.dim() != 3 and own(a, b))  # as if experts were garbled on disk
    with pytest.raises(ModelError, match=r"experts\..* does not come back from disk"):
        write_pruned(source, dict.fromkeys(range(4), (0, 1)), out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["whole"]
