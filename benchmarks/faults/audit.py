"""Start, disturb and judge the audit of a trial, which runs in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from audit.runfolder import SCHEMAS, RunFolder
from benchmarks.faults.nodes import ROOT
from benchmarks.faults.trial import Point, Trial, tables

KEYS: Mapping[Literal["effects", "tokens"], tuple[str, ...]] = {
    "effects": ("sequence", "position", "layer", "unit", "slot"),
    "tokens": ("sequence", "position"),
}
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal: a process has begun or ended a task."""

    time: float
    pid: int
    what: Literal["begun", "ended"]
    task: str
    rank: int


@dataclass(frozen=True, slots=True)
class Losses:
    """What is wrong with the committed rows of a finished run."""

    lost: int  # expected, not there
    twice: int  # there once more than they should be, or not expected at all
    changed: int  # tables whose rows are not the expected ones to the bit
    orphans: int  # files that no manifest names


class Audit:
    """A trial's driver as a child process. It may be started again after it ended, as a person would.

    ``environment``: of a process that joins the cluster, or without RAY_ADDRESS for one of its own.
    """

    def __init__(self, trial: Trial, environment: Mapping[str, str]) -> None:
        self.trial = trial
        self.starts = 0
        self._environment = dict(environment)
        self._state = Path(trial.state)
        self._state.mkdir(parents=True, exist_ok=True)
        self._file = self._state / "trial.json"
        trial.write(self._file)
        self._log = self._state / "said.txt"
        self.process: subprocess.Popen[bytes]

    def start(self) -> Audit:
        search = os.pathsep.join([str(ROOT), *filter(None, [self._environment.get("PYTHONPATH")])])
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faults.program", str(self._file)],
                env={**self._environment, "PYTHONPATH": search},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.starts += 1
        return self

    def said(self) -> list[str]:
        """What the user was told, all starts together."""
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    # While it runs ---------------------------------------------------------------------------------------------------

    def wait_until(self, seconds: float, holds: Callable[[], bool]) -> None:
        """Raise AssertionError, with what was said, where it does not come to hold while the driver lives."""
        end = time.monotonic() + seconds
        while not holds():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > end:
                said = "\n".join(self.said())
                raise AssertionError(f"what was waited for did not happen (driver's status: {ended}); it said:\n{said}")
            time.sleep(_POLL_SECONDS)

    def wait_paused(self, point: Point, seconds: float = 60.0) -> None:
        self.wait_until(seconds, (self._state / f"paused-{point}").exists)

    def release(self, point: Point) -> None:
        (self._state / f"paused-{point}").unlink()

    def open_gate(self) -> None:
        (self._state / "open").touch()

    def wait(self, seconds: float) -> int | None:
        """The driver's exit status as soon as there is one, after so many seconds None."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """SIGKILL to the driver."""
        self.process.kill()
        self.process.wait()
        for marker in self._state.glob("paused-*"):
            marker.unlink()

    def cure(self) -> None:
        """From the next start on nothing goes wrong by itself."""
        self.trial = replace(self.trial, faults=(), pauses=())
        self.trial.write(self._file)

    def finish(self, seconds: float = 300.0) -> int:
        """The driver's exit status; it is killed, and AssertionError raised, where it takes longer."""
        status = self.wait(seconds)
        if status is None:
            self.kill()
            said = "\n".join(self.said())
            raise AssertionError(f"not finished within {seconds:g} seconds; it said:\n{said}")
        return status

    # The journal -----------------------------------------------------------------------------------------------------

    def journal(self) -> list[Entry]:
        lines = [line for file in self._state.glob("journal-*") for line in file.read_text().splitlines()]
        return sorted((Entry(**json.loads(line)) for line in lines), key=lambda entry: entry.time)

    def running(self) -> dict[int, str]:
        """The living processes that are at a task, and which."""
        latest = {(entry.pid): entry for entry in self.journal()}
        return {pid: e.task for pid, e in latest.items() if e.what == "begun" and psutil.pid_exists(pid)}

    def struck(self) -> float:
        """When the first of the trial's own faults happened, in seconds since the epoch."""
        return min(marker.stat().st_mtime for marker in self._state.glob("fault-*"))

    def seconds_to_go_on(self, fault: float) -> float | None:
        """From the fault until a task was begun by a process that had not begun one before it, or begun once more;
        None where all was done before.
        """
        before = [entry for entry in self.journal() if entry.time <= fault]
        pids, tasks = {entry.pid for entry in before}, {entry.task for entry in before}
        went_on = [
            entry.time
            for entry in self.journal()
            if entry.time > fault and entry.what == "begun" and (entry.pid not in pids or entry.task in tasks)
        ]
        return min((time - fault for time in went_on), default=None)

    def seconds_to_commit(self, fault: float) -> float | None:
        """From the fault until the next manifest was there."""
        times = [path.stat().st_mtime for path in Path(self.trial.folder, "manifests").glob("*.json")]
        return min((time - fault for time in times if time > fault), default=None)

    # When it has ended -----------------------------------------------------------------------------------------------

    def results(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(Path(self.trial.folder, "results").iterdir())}

    def losses(self, without: tuple[str, ...] = ()) -> Losses:
        """Rows against those that the tasks must have written, but for the tasks ``without`` any."""
        folder = RunFolder(self.trial.folder)
        lost = twice = changed = orphans = 0
        for name, key in KEYS.items():
            parts = [tables(task)[name] for task in self.trial.measure() if task.id not in without]
            expected = _plain(pa.concat_tables(parts))
            read = [pq.read_table(path, schema=SCHEMAS[name]) for path in folder.files(name)]
            found = _plain(pa.concat_tables([SCHEMAS[name].empty_table(), *read]))
            wanted, there = (Counter(zip(*(t[c].to_pylist() for c in key), strict=True)) for t in (expected, found))
            lost += (wanted - there).total()
            twice += (there - wanted).total()
            order = [(column, "ascending") for column in key]
            changed += not expected.sort_by(order).equals(found.sort_by(order))
            on_disk = {str(path) for path in Path(self.trial.folder, name).rglob("*") if path.is_file()}
            orphans += len(on_disk - set(folder.files(name)))
        return Losses(lost, twice, changed, orphans)


def _plain(table: pa.Table) -> pa.Table:
    """Words as strings, not as numbers of a dictionary that every file has anew."""
    fields = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields)).combine_chunks()


def send(pid: int, number: signal.Signals) -> float:
    """Send a signal; returns when, in seconds since the epoch."""
    os.kill(pid, number)
    return time.time()
