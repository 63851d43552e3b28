"""The command line on a small random model: mistakes, plan, a whole run, its status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from shapes import Call
from tiny_olmoe import write_tiny_olmoe

from audit.config import AuditConfig
from audit.runfolder import RunFolder
from cluster.groups.engine_worker import EngineWorker
from cluster.planning.plan import prepare
from jobs.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, texts and ``audit.yaml``."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny_olmoe(folder / "model", layers=2, experts=4, top_k=2)
    (folder / "texts").mkdir()
    for number in range(6):
        text = f"Document {number} says: the expert that answers is not the expert that was asked. " * 2
        (folder / "texts" / f"{number}.txt").write_text(text)
    specification = {
        "model": {"source": "./model"},
        "corpus": {"sources": [{"kind": "text", "path": "texts", "domain": "prose"}], "max_tokens": 48},
        "positions": {"sample": 60},
        "interventions": [{"kind": "zero"}, {"kind": "mean"}],
        "cluster": {"max_groups": 2},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path, ray_cluster: None) -> Path:
    """A finished run."""
    with pytest.raises(SystemExit) as ended:
        main(["run", str(place / "audit.yaml"), "--out", str(place / "run"), "--display", "none"])
    assert ended.value.code == 0
    return place / "run"


def test_help_loads_nothing() -> None:
    loaded = "sorted({'torch', 'ray', 'audit', 'cluster'} & set(sys.modules))"
    code = f"import sys, jobs.cli; jobs.cli.parser().format_help(); print({loaded})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("change", "names", "value"),
    [
        ("model.sauce=demo", "model.sauce", "sauce"),
        ("model.source=./nowhere", "model.source", "nowhere"),
        ("layers=[0,7]", "layers", "7"),
        ("corpus.max_tokens=512", "corpus.max_tokens", "512"),
        ("interventions=[{kind: erase}]", "interventions", "erase"),
        ("interventions=[{kind: zero, target: {highest: 3}}]", "interventions.0", "3"),
        ("positions.sample=100000", "positions.sample", "100000"),
        ("calibration.documents=6", "calibration.documents", "6"),
        ("engine.memory=1MiB", "engine.memory", "1 MiB"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    place: Path, tmp_path: Path, call: Call, change: str, names: str, value: str
) -> None:
    status, out, err = call("run", place / "audit.yaml", "--out", tmp_path / "new", "--set", change)
    assert status == 2
    assert out == ""
    assert err.startswith("moe-audit: ")
    assert err.count("\n") == 1
    assert names in err
    assert value in err
    assert list(tmp_path.iterdir()) == []


def test_an_out_folder_that_cannot_be_one_is_refused(place: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "thesis.tex").touch()
    status, _, err = call("run", place / "audit.yaml", "--out", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "holds files but no run.json" in err
    status, _, err = call("status", tmp_path)
    assert (status, err.count("\n")) == (2, 1)


def test_plan_tells_and_does_nothing(place: Path, call: Call) -> None:
    before = sorted(place.rglob("*"))
    status, out, _ = call("plan", place / "audit.yaml")
    assert status == 0
    (effects,) = [line for line in out.splitlines() if "effects " in line and "│" in line]
    rows = int(effects.split("│")[3])
    # 60 positions, 2 layers, 2 experts, 2 interventions, and identity rows at an eighth of the positions
    assert rows == pytest.approx(60 * 2 * 2 * 2 + 60 * 2 / 8, rel=0.02)
    assert sorted(place.rglob("*")) == before


def test_validate_and_models_say_what_was_found(place: Path, call: Call) -> None:
    status, out, _ = call("models", place / "audit.yaml")
    assert status == 0
    for line in (
        "layers          2",
        "MoE layers      2 (0, 1)",
        "experts         4",
        "top-k           2",
        "shared experts  no",
    ):
        assert line in out
    status, out, _ = call("validate", place / "audit.yaml")
    assert status == 0
    assert "is valid" in out
    assert "6 documents" in out
    assert "engine sweep" in out


def test_a_run_equals_its_tasks_done_one_by_one_without_ray(place: Path, finished: Path) -> None:
    config = AuditConfig.load(place / "audit.yaml")
    folder = RunFolder(str(finished))
    job = prepare(config, folder.require_run()["identity"]["resolved"])
    worker = job.make_worker(str(finished))
    assert isinstance(worker, EngineWorker)
    folders = {"merge-calibration": str(folder.done()["merge-calibration"]["folder"])}
    alone = [worker.run(task.found(folders), 1).tables for task in dict(job.stages)["effects"]]
    for name in ("effects", "tokens"):
        ours = pa.concat_tables(tables[name] for tables in alone).to_pylist()
        assert len(ours) > 59
        assert sorted(folder.dataset(name).to_table().to_pylist(), key=repr) == sorted(ours, key=repr)


def test_a_finished_run_prints_its_tables_again_at_once(place: Path, finished: Path, call: Call) -> None:
    status, out, err = call("run", place / "audit.yaml", "--out", finished)
    assert (status, err) == (0, "")
    assert "Mean effect per layer: zero, every active expert by itself, scope token" in out
    assert "Most important experts by mean KL: mean, every active expert by itself, scope token" in out
    assert "Least important experts" in out
    assert "Noise floor" in out
    layers = RunFolder(str(finished)).read_table("layers").to_pandas()
    for mean in layers.mean_kl:
        assert f"{mean:.3e}" in out


def test_status_reads_the_folder_alone(finished: Path, call: Call) -> None:
    status, out, _ = call("status", finished)
    assert status == 0
    assert out.count("100%") == 3


def test_another_specification_on_the_folder_is_refused(place: Path, finished: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    status, out, err = call("run", place / "audit.yaml", "--out", finished, "--set", "positions.sample=61")
    assert (status, out) == (2, "")
    assert err.startswith("moe-audit: positions.sample: ")
    assert "begun with 60, now it is 61" in err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_how_the_work_is_spread_may_change(place: Path, finished: Path, call: Call) -> None:
    status, _, _ = call(
        "run", place / "audit.yaml", "--out", finished, "--set", "cluster.max_groups=1", "--set", "name=other"
    )
    assert status == 0


def test_run_json_tells_what_was_run(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert run["specification"]["positions"]["sample"] == 60
    assert run["identity"]["resolved"]["method"] == "sweep"
    assert len(run["identity"]["model"]["weights"]) == 64
    assert run["environment"]["versions"]["torch"] == torch.__version__
