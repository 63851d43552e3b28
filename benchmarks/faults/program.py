"""The driver of a trial, to be killed: ``python -m benchmarks.faults.program TRIAL.json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from audit.runfolder import Manifest, RunFolder, RunFolderError
from audit.storage import StorageError
from benchmarks.faults.trial import Pause, Point, Trial, TrialWorker, strike
from cluster import run
from cluster.display import LineDisplay
from cluster.driver.driver import Policy, RunError
from cluster.driver.group import Result, Shape
from cluster.driver.scaling import Scale
from cluster.results import parquet_sink
from cluster.results.committer import FolderCommitter
from cluster.results.parquet_sink import ParquetSink, Written


class Pauses:
    """Where the driver stands still, once; whoever watches sees a marker and removes it."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._commit = trial, 0

    def begin_commit(self) -> None:
        self._commit += 1

    def reach(self, point: Point) -> None:
        seen = Path(self._trial.state, f"reached-{point}")
        if Pause(point, self._commit) in self._trial.pauses and not seen.exists():
            seen.touch()
            marker = Path(self._trial.state, f"paused-{point}")
            marker.touch()
            while marker.exists():
                time.sleep(0.02)


class DyingSink(ParquetSink):
    """Its write tasks die when they have written."""

    def __init__(self, url: str, target: str, trial: Path) -> None:
        super().__init__(url, target)
        self._trial = trial

    def write(self, blocks: Iterable[pa.Table], ctx: object) -> Written:
        written = super().write(blocks, ctx)
        strike(Trial.read(self._trial), self.target.partition("/")[0])
        return written


class Folder(RunFolder):
    def __init__(self, url: str, pauses: Pauses) -> None:
        super().__init__(url)
        self._pauses = pauses

    def commit(self, manifest: Manifest) -> None:
        self._pauses.reach("files")
        super().commit(manifest)
        self._pauses.reach("manifest")


class Committer(FolderCommitter):
    pauses: Pauses

    def commit(self, results: Sequence[Result]) -> None:
        self.pauses.begin_commit()
        self.pauses.reach("answers")
        super().commit(results)


def job(trial: Trial) -> run.Job:
    return run.Job(
        stages=(("effects", trial.measure()),),
        identity={"specification": {"seed": 0}, "tasks": trial.tasks, "positions": trial.positions},
        information={"specification": {}, "model": {"source": "none"}},
        make_worker=partial(TrialWorker, trial),
        scale=Scale(min_groups=trial.min_groups, max_groups=trial.groups),
        shape=Shape(ranks=trial.ranks, cpus=trial.cpus),
        policy=Policy(**{"commit_results": 4, "relaunch_seconds": 0.1, **trial.policy}),  # type: ignore[arg-type]
    )


def main(path: Path) -> int:
    trial = Trial.read(path)
    Committer.pauses = pauses = Pauses(trial)
    setattr(run, FolderCommitter.__name__, Committer)
    if any(fault.kind == "write" for fault in trial.faults):
        setattr(parquet_sink, ParquetSink.__name__, partial(DyingSink, trial=path))
    try:
        outcome = run.execute(job(trial), Folder(trial.folder, pauses), LineDisplay(sys.stderr, seconds=1.0))
    except (RunError, RunFolderError, StorageError) as error:
        print(error, file=sys.stderr)
        return 1
    return outcome.exit_status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
