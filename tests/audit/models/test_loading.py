"""From a checkpoint to a model ready to audit, and the one sentence for each that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import RECURRENT, SWEEP, build, config_of, ready, texts

import audit
from audit.models import ModelError, describe, prepare
from audit.models.loading import load_model
from audit.models.sources import load_tokenizer, resolve_device, resolve_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the library saves one, without a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    build("deepseek_v3", 3, torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_saved_checkpoint_loads_and_gives_the_same_effects(folder: Path, dtype: str) -> None:
    model = audit.load(str(folder), dtype=dtype, device="cpu", linear="torch")
    assert model.tokenizer is None
    assert model.dtype == getattr(torch, dtype)
    assert (model.description.engine, model.reroute_refused) == ("sweep", None)
    assert model.description.source == str(folder)
    ids = texts((5,), 1)[0].token_ids.tolist()
    found = audit.measure(model, ids, layers=[2]).to_pandas()
    assert len(found) == 5 * 2 + 1
    if dtype == "float64":
        here = audit.validate(prepare(build("deepseek_v3", 3, torch.float32).double()))
        want = audit.measure(here, ids, layers=[2]).to_pandas()
        assert found["kl"].to_numpy() == pytest.approx(want["kl"].to_numpy(), rel=1e-5, abs=1e-9)
    with pytest.raises(ValueError, match="text: this model has no tokenizer; give token ids"):
        audit.measure(model, "words")


@pytest.mark.parametrize(
    "where", ["audit.models.loading._compare_clean", "audit.models.experts.experts_of", "audit.models.head.Head.change"]
)
def test_memory_that_runs_out_while_a_model_is_tried_is_no_reason_to_take_a_slower_way(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, full)
    with pytest.raises(torch.OutOfMemoryError):
        prepare(build("olmoe", 0, torch.float32))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_a_tokenizer_that_the_library_makes_up_is_none(family: str, tmp_path: Path) -> None:
    build(family, 0, torch.float32).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)) is None
    assert load_tokenizer(resolve_source("demo")) is not None


def test_what_was_found(folder: Path) -> None:
    loaded, read = load_model(str(folder)).description, describe(str(folder))
    for found in (loaded, read):
        assert found.family == "deepseek_v3"
        assert (found.layers, found.moe_layers, found.experts, found.top_k) == (4, (1, 2, 3), 8, 2)
        assert (found.hidden_size, found.vocabulary, found.context_limit) == (64, 128, 256)
        assert found.shared_experts
        assert "norm_topk_prob=True" in found.router_rule
    module = build("deepseek_v3", 3, torch.float32)
    assert loaded.parameters == read.parameters == sum(p.numel() for p in module.parameters())
    assert loaded.bytes == 4 * loaded.parameters


@pytest.mark.parametrize("family", SWEEP | RECURRENT)
def test_every_family_is_described_without_its_weights(family: str, tmp_path: Path) -> None:
    config_of(family).save_pretrained(tmp_path)
    found, loaded = describe(str(tmp_path)), prepare(build(family)).description
    names = ("family", "layers", "moe_layers", "experts", "top_k", "shared_experts", "router_rule", "parameters")
    assert [getattr(found, n) for n in names] == [getattr(loaded, n) for n in names]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "model.dtype: 'float8' is unknown; known are float64, float32, bfloat16, float16"),
        ({"device": "gpu"}, "model.device: 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "model.device: 'mps' is unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), **options)  # type: ignore[arg-type]


def test_an_absent_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="'cuda:1' was asked for, but this machine has no CUDA device"):
        resolve_device("cuda:1")
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="'cuda:2' was asked for, but this machine has 2 of them; use cuda, or a"):
        resolve_device("cuda:2")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(ModelError, match=r"holds no config\.json; name the folder of a checkpoint"):
            load_model(source)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model("nobody/has-this-model")  # tests have no network
    assert resolve_source("owner/name") == "owner/name"


def test_a_configuration_that_is_not_a_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    for load in (load_model, describe):
        with pytest.raises(ModelError, match="no-such-family"):
            load(str(tmp_path))


def test_moe_layers_that_the_configuration_promises_must_be_there() -> None:
    module = build("deepseek_v3")
    module.model.layers[2].mlp = module.model.layers[0].mlp  # the dense one
    with pytest.raises(ModelError, match=r"promises MoE layers \[1, 2, 3\], found were \[1, 3\]"):
        prepare(module)


def test_a_configuration_that_promises_nothing_is_noted() -> None:
    assert any("does not say which layers" in note for note in ready("mixtral").description.notes)
    assert not any("does not say which layers" in note for note in ready("deepseek_v3").description.notes)


def test_paths_that_are_asked_for_by_name() -> None:
    module = build("olmoe", 0, torch.float32)
    assert prepare(module, experts="module").experts_path == "module"
    assert prepare(module, experts="sorted").experts_path == "sorted"
    assert prepare(module, linear="torch").linear_path == "torch"
    assert prepare(module, linear="onednn").linear_path == "onednn"
    assert prepare(build("olmoe"), linear="onednn").linear_path == "torch"  # float64 has no other
    for layer in module.model.layers:
        layer.mlp.experts._apply_gate = lambda both: both.chunk(2, dim=-1)[0]
    assert prepare(module).experts_path == "module"
    with pytest.raises(ModelError, match="'sorted' does not reproduce this model's experts module"):
        prepare(module, experts="sorted")


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    build("olmoe", dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"model.source: '.*' cannot be loaded \(.*header.*\); name a folder with a"):
        audit.load(str(tmp_path), device="cpu")
