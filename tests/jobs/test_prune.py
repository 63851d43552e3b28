"""``moe-audit prune``: a smaller checkpoint by a metric of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import Call
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.engine.validate import load
from audit.pruning import PrunedForward
from audit.runfolder import RunFolder
from jobs.cli import main

TEXT = "the expert that answers is not the expert that was asked"


@pytest.fixture(scope="module")
def audited(place: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without studies."""
    run = tmp_path_factory.mktemp("audited") / "run"
    smaller = ("--set", "studies={}", "--set", "positions.sample=2", "--set", "attribution=false")
    with pytest.raises(SystemExit) as ended:
        main(["run", str(place / "audit.yaml"), "--out", str(run), "--display", "none", *smaller])
    assert ended.value.code == 0
    return run


@pytest.fixture(scope="module")
def pruned(audited: Path) -> Path:
    return audited.parent / "pruned"


def loss(folder: Path, ids: torch.Tensor) -> float:
    """Mean loss by plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return float(model(input_ids=ids[None], labels=ids[None]).loss)


def test_the_checkpoint_loses_what_the_simulated_pruning_does(
    place: Path, audited: Path, pruned: Path, call: Call
) -> None:
    status, out, err = call("prune", audited, "--metric", "frequency", "--keep", 5, "--out", pruned)
    assert status == 0, err
    assert f"{pruned}: 5 experts in each of 3 layers (num_experts 8 -> 5)" in out

    metrics = RunFolder(str(audited)).read_table("metrics").to_pandas()
    overall = metrics[metrics["domain"].isna() & (metrics["metric"] == "utilization")]
    lowest = {
        int(layer): rows.sort_values("value")["expert"].head(3).tolist() for layer, rows in overall.groupby("layer")
    }
    ids = torch.tensor(AutoTokenizer.from_pretrained(pruned)(TEXT)["input_ids"][:40])
    forward = PrunedForward(load(str(place / "model"), device="cpu"), [ids])
    expected = forward.baseline_loss_M + forward.outcomes(lowest).delta_loss
    assert loss(pruned, ids) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert abs(loss(pruned, ids) - loss(place / "model", ids)) > 1e-3


@pytest.mark.parametrize(
    ("metric", "keep", "message"),
    [
        ("reap", 2, "--keep: 2 of 8 experts is not possible, a token is routed to 3; choose 3 to 7"),
        ("reap", 8, "--keep: 8 of 8 experts is not possible"),
        ("raep", 5, "--metric: 'raep' is unknown; known are utilization"),
        ("routing_weight", 5, "--metric: 'routing_weight' is unknown"),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    audited: Path, tmp_path: Path, call: Call, metric: str, keep: int, message: str
) -> None:
    status, out, err = call("prune", audited, "--metric", metric, "--keep", keep, "--out", tmp_path / "new")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"moe-audit: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_and_a_folder_without_a_run_are_refused(
    audited: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "thesis.tex").touch()
    status, _, err = call("prune", audited, "--metric", "reap", "--keep", 5, "--out", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("moe-audit: --out: ")
    assert "is not empty" in err
    status, _, err = call("prune", tmp_path, "--metric", "reap", "--keep", 5, "--out", tmp_path / "new")
    assert (status, err.count("\n")) == (2, 1)
    assert "holds no run.json" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_without_metrics_yet_is_told_to_finish(audited: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes((audited / "run.json").read_bytes())
    status, _, err = call("prune", tmp_path / "run", "--metric", "reap", "--keep", 5, "--out", tmp_path / "new")
    assert (status, err.count("\n")) == (2, 1)
    assert "metrics.parquet is not there yet; run the same command again to finish the run" in err
