"""Code that comes with a checkpoint, as Python or inside pickled weights, runs where the specification says so only."""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from families import build

from audit.config import AuditConfig
from audit.models import ModelError, describe
from audit.models.loading import load_model

CODE = """
from pathlib import Path
from transformers import OlmoeConfig, OlmoeForCausalLM

Path(__file__).parent.joinpath("ran").touch()
Path({marker!r}).touch()

class TinyConfig(OlmoeConfig):
    model_type = "tiny_remote"

class TinyForCausalLM(OlmoeForCausalLM):
    config_class = TinyConfig
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a checkpoint makes when it runs; the library copies such code to the test's folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def with_code(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint whose model is of a class in its own folder."""
    folder = tmp_path / "with_code"
    folder.mkdir()
    (folder / "tiny_code.py").write_text(CODE.format(marker=str(marker)))
    specification = importlib.util.spec_from_file_location("tiny_code", folder / "tiny_code.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    plain = build("olmoe", 1, torch.float32)
    model = module.TinyForCausalLM(module.TinyConfig.from_dict(plain.config.to_dict() | {"model_type": "tiny_remote"}))
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "tiny_code.TinyConfig", "AutoModelForCausalLM": "tiny_code.TinyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    marker.unlink()
    return folder


@pytest.mark.parametrize("read", [load_model, describe])
def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    with_code: Path, marker: Path, read: Callable[..., object]
) -> None:
    with pytest.raises(ModelError, match=r"model\.trust_remote_code: .*'.*with_code'.* true"):
        read(str(with_code))
    assert not marker.exists()
    read(str(with_code), trust_remote_code=True)
    assert marker.exists()


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return _touch, (str(self._path),)


def _touch(path: str) -> None:
    Path(path).touch()


def test_pickled_weights_are_read_only_where_that_is_allowed(tmp_path: Path, marker: Path) -> None:
    module = build("olmoe", 1, torch.float32)
    module.config.save_pretrained(tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.source: .*safetensors.*model\.allow_pickle: true"):
        load_model(str(tmp_path))
    loaded = load_model(str(tmp_path), allow_pickle=True).module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(module.state_dict() | {"bomb": _Bomb(marker)}, file)
    with pytest.raises(ModelError):
        load_model(str(tmp_path))
    assert not marker.exists()


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    module = build("olmoe", 1, torch.float32)
    state = module.state_dict()
    name = "model.layers.0.mlp.gate.weight"
    module.save_pretrained(tmp_path, state_dict={key: value for key, value in state.items() if key != name})
    with pytest.raises(ModelError, match=rf"lacks 1 of the model's weights, such as {name}"):
        load_model(str(tmp_path))


def test_neither_is_trusted_unless_written(tmp_path: Path) -> None:
    config = AuditConfig.parse({}, tmp_path)
    assert (config.model.trust_remote_code, config.model.allow_pickle) == (False, False)
