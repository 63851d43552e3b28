"""A run says whether code or pickles of a checkpoint were trusted, and does not go on with another answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from shapes import Call
from tiny_olmoe import write_tiny_olmoe

from audit.config import AuditConfig
from audit.runfolder import RunFolder, RunFolderError
from cluster.planning.plan import prepare
from cluster.run import refuse_other
from jobs.commands import _about


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``audit.yaml`` and a checkpoint whose weights are pickled."""
    folder = tmp_path_factory.mktemp("trust")
    write_tiny_olmoe(folder / "model", layers=2, experts=4, top_k=2)
    weights = folder / "model/model.safetensors"
    torch.save(safetensors.torch.load_file(weights), folder / "model/pytorch_model.bin")
    weights.unlink()
    (folder / "texts").mkdir()
    for number in range(3):
        text = f"Document {number} says: the expert that answers is not the expert that was asked."
        (folder / "texts" / f"{number}.txt").write_text(text)
    specification = {
        "model": {"source": "./model"},
        "corpus": {"sources": [{"kind": "text", "path": "texts", "domain": "prose"}], "max_tokens": 48},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return folder


def test_pickled_weights_are_a_mistake_unless_they_are_allowed(place: Path, call: Call) -> None:
    status, out, err = call("validate", place / "audit.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "model.allow_pickle: true" in err
    assert call("validate", place / "audit.yaml", "--set", "model.allow_pickle=true")[0] == 0


def test_the_record_says_what_was_trusted(place: Path, tmp_path: Path) -> None:
    job = prepare(AuditConfig.load(str(place / "audit.yaml"), ["model.allow_pickle=true"]))
    folder = RunFolder(str(tmp_path / "run"))
    folder.begin({"identity": job.identity, "run": job.digest, **job.information})
    recorded = folder.require_run()["specification"]["model"]
    assert (recorded["trust_remote_code"], recorded["allow_pickle"]) == (False, True)
    assert "pickled weights were allowed (model.allow_pickle)" in _about(folder)
    assert not any("trust_remote_code" in line for line in _about(folder))
    other = dict(job.identity["specification"])
    other["model"] = other["model"] | {"trust_remote_code": True}
    with pytest.raises(RunFolderError, match=r"model\.trust_remote_code: .* begun with False, now it is True"):
        refuse_other(folder, {"specification": other})
