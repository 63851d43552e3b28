"""The program of a job on this machine: the command's own behaviour, and signals before, between and after the work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from tiny_olmoe import write_tiny_olmoe

from audit.runfolder import RunFolder
from cluster import session
from cluster.planning import plan
from cluster.results import reducer
from jobs import run_audit

Start = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_tiny_olmoe(folder / "model", layers=2, experts=4, top_k=2)
    texts = "\n".join(f"Line {number}: the expert that answers was not asked." for number in range(8))
    (folder / "lines.txt").write_text(texts)
    specification = {
        "model": {"source": "./model"},
        "corpus": {
            "sources": [{"kind": "text", "path": "lines.txt", "domain": "prose", "per_line": True}],
            "max_tokens": 48,
        },
        "cluster": {"max_groups": 1},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return folder


@pytest.fixture
def start(place: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """Exit status, standard output and standard error of the program with this --out."""

    def run(out: Path, *changes: str) -> tuple[int, str, str]:
        given = ["--config", str(place / "audit.yaml"), "--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            run_audit.main([*given, *(part for change in changes for part in ("--set", change))])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


def struck(function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The function with a SIGTERM of the operating system right before it, or right after."""

    def call(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options) if after else None
        os.kill(os.getpid(), signal.SIGTERM)
        return found if after else function(*arguments, **options)

    return call


def test_a_stop_while_the_model_loads_leaves_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "load_audited", struck(plan.load_audited))
    status, out, err = start(tmp_path / "run")
    assert (status, out) == (143, "")
    assert "the same command goes on" in err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("after", [False, True])
def test_a_stop_while_ray_starts_leaves_no_process_and_no_file(
    no_ray: None, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(session, "_SCRATCH", "/tmp/moe-stop-")
    monkeypatch.setattr(session.ray, "init", struck(ray.init, after=after))
    status, _, err = start(tmp_path / "run")
    assert status == 143
    assert "the same command goes on" in err
    assert not ray.is_initialized()
    assert [path.name for path in Path("/tmp").glob("moe-stop-*")] == []
    living = [process for process in psutil.process_iter(["cmdline"]) if "moe-stop-" in str(process.info["cmdline"])]
    assert psutil.wait_procs(living, timeout=30)[1] == []
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_stop_while_results_are_reduced_loses_nothing_and_the_same_command_goes_on(
    ray_cluster: None, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as once:
        once.setattr(reducer, "reduce", struck(reducer.reduce))
        status, _, err = start(tmp_path / "run")
    assert status == 143
    assert "reducing" in err
    folder = RunFolder(str(tmp_path / "run"))
    commits = {manifest.commit for manifest in folder.manifests()}
    assert commits
    assert not (tmp_path / "run" / "results").exists()
    status, out, err = start(tmp_path / "run")
    assert status == 0, err
    assert "result tables in" in out
    assert {manifest.commit for manifest in folder.manifests()} == commits
    assert folder.read_table("layers").num_rows > 0


def test_progress_is_plain_lines_and_mistakes_have_status_2(ray_cluster: None, start: Start, tmp_path: Path) -> None:
    status, out, err = start(tmp_path / "run", "seed=1", "positions.sample=20")
    assert status == 0, err
    assert "effects: " in err
    assert "\x1b" not in out + err
    status, out, err = start(tmp_path / "run", "seed=2", "positions.sample=20")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "seed: " in err
    status, out, err = start(tmp_path / "other", "positions.sampel=20")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "positions.sampel" in err
