"""Whole runs on a real Ray cluster of this machine, with a worker that needs no model."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from stub_job import make_job, rows_of
from stub_worker import FaultPlan, tables

from audit.runfolder import RunFolder, RunFolderError
from cluster.display import LineDisplay, NoDisplay
from cluster.driver.driver import Policy
from cluster.run import Job, Outcome, execute

pytestmark = pytest.mark.usefixtures("ray_cluster")
HERE = Path(__file__).parent
RESULTS = ("layers", "experts", "noise_floor")


def run(path: Path, job: Job) -> tuple[RunFolder, Outcome]:
    folder = RunFolder(str(path))
    return folder, execute(job, folder, NoDisplay())


def expected(name: str, skip: str = "") -> list[tuple[object, ...]]:
    measure = make_job().stages[-1][1]
    return rows_of([tables(task)[name] for task in measure if task.id != skip])


def require_exact(folder: RunFolder, skip: str = "") -> None:
    """Every row once, none missing, none that no manifest names."""
    for name in ("effects", "tokens"):
        assert rows_of([folder.dataset(name).to_table()]) == expected(name, skip)
        on_disk = {str(path) for path in Path(folder.url, name).rglob("*.parquet")}
        assert on_disk == set(folder.files(name))


def results_of(folder: RunFolder) -> dict[str, bytes]:
    return {name: Path(folder.url, "results", f"{name}.parquet").read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def whole(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder, outcome = run(tmp_path_factory.mktemp("whole"), make_job(calibration=2))
    assert outcome.exit_status == 0
    return folder


def test_an_uninterrupted_run_is_exact(whole: RunFolder) -> None:
    require_exact(whole)
    merged = whole.done()["merge-calibration"]["folder"]
    assert Path(whole.url, merged, "sum").read_text() == "observe-0000+observe-0001"
    effects = pa.concat_tables(tables(task)["effects"] for task in make_job().stages[-1][1]).to_pandas()
    experts = whole.read_table("experts").to_pandas()
    means = (
        effects[effects.unit == "expert"].astype({"kl": float}).groupby(["layer", "expert"], observed=True).kl.mean()
    )
    assert experts.set_index(["layer", "expert"]).mean_kl.to_dict() == pytest.approx(means.to_dict())


@pytest.mark.parametrize(("moment", "count"), [("manifest", 4), pytest.param("answer", 5, marks=pytest.mark.full)])
def test_a_run_goes_on_where_a_killed_driver_left_it(whole: RunFolder, tmp_path: Path, moment: str, count: int) -> None:
    """With one group after two: neither the interruption nor their number changes a bit."""
    command = [sys.executable, str(HERE / "killed_driver.py"), str(tmp_path), moment, str(count)]
    search = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = RunFolder(str(tmp_path)).done()
    assert 3 <= len(before) < 12  # the calibration, and not everything
    folder, outcome = run(tmp_path, make_job(calibration=2, groups=1))
    assert outcome.exit_status == 0
    require_exact(folder)
    assert results_of(folder) == results_of(whole)
    assert before.items() <= folder.done().items()


def test_a_finished_run_is_not_run_again(whole: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(whole.url).rglob("*") if path.name != "lock"}
    assert execute(make_job(calibration=2), whole, NoDisplay()).exit_status == 0
    assert {path: path.stat().st_mtime_ns for path in Path(whole.url).rglob("*") if path.name != "lock"} == before


def test_faults_lose_nothing_and_a_task_that_always_fails_is_quarantined(whole: RunFolder, tmp_path: Path) -> None:
    plan = FaultPlan(
        {
            ("effects-0003", 1): "kill",
            ("effects-0004", 0): "raise",
            ("effects-0006", 1): "hang",
            ("effects-0007", 1): "kill",
        }
    )
    policy = Policy(commit_results=4, relaunch_seconds=0.0, hang_seconds=8.0)
    folder, out = RunFolder(str(tmp_path)), io.StringIO()
    outcome = execute(make_job(calibration=2, plan=plan, policy=policy), folder, LineDisplay(out))
    assert outcome.exit_status == 1
    assert list(outcome.quarantined) == ["effects-0004"]
    (record,) = folder.lines("quarantine.jsonl")
    assert (record["task"], record["attempts"]) == ("effects-0004", 3)
    assert "effects-0004 was told to fail" in record["error"]
    assert out.getvalue().count("was lost while it ran") == 3
    assert "no answer within 8 seconds" in out.getvalue()
    require_exact(folder, skip="effects-0004")
    # The cause is gone: the same command does what is missing.
    _, outcome = run(tmp_path, make_job(calibration=2))
    assert outcome.exit_status == 0
    require_exact(folder)
    assert results_of(folder) == results_of(whole)


def test_without_calibration_nothing_that_needs_it_is_run(tmp_path: Path) -> None:
    bad = FaultPlan({("observe-0001", 0): "raise"})
    folder, outcome = run(tmp_path, make_job(calibration=2, tasks=2, plan=bad))
    assert outcome.exit_status == 1
    assert list(outcome.quarantined) == ["observe-0001"]
    assert outcome.blocked == ["merge-calibration", "effects-0000", "effects-0001"]
    assert list(folder.done()) == ["observe-0000"]


def test_another_specification_is_refused_and_the_difference_named(whole: RunFolder) -> None:
    before = sorted(Path(whole.url).rglob("*"))
    with pytest.raises(RunFolderError, match=r"^seed: .* was begun with 0, now it is 1; name another --out"):
        execute(make_job(calibration=2, identity={"specification": {"seed": 1}}), whole, NoDisplay())
    assert sorted(Path(whole.url).rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)]
)
def test_a_stop_signal_commits_what_is_finished(tmp_path: Path, number: int, status: int) -> None:
    job = make_job(tasks=8, seconds=0.3, policy=Policy(commit_results=100))
    progress = io.StringIO()

    class Watch(LineDisplay):
        sent = False

        def show(self, status: object) -> None:
            if not self.sent and getattr(status, "tasks_done", 0) >= 2:
                self.sent = True
                os.kill(os.getpid(), number)

    folder = RunFolder(str(tmp_path))
    outcome = execute(job, folder, Watch(progress))
    assert outcome.exit_status == status
    assert 2 <= len(folder.done()) < 8
    assert len({row["sequence"] for row in folder.dataset("effects").to_table().to_pylist()}) == len(folder.done())
