"""A trial: a small audit whose rows are known beforehand, and what is to go wrong in it.

The worker needs no model. It keeps a journal of what it begins and ends, and strikes itself where the trial says so, by
marker files: a fault happens as often as it should, whoever runs the task and however often the driver is started.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from audit.effects import EFFECTS, TOKENS
from cluster.driver.group import Place
from cluster.tasks import Task
from cluster.worker import Output

LAYERS, EXPERTS, TOP_K = (1, 3), 6, 2
CHUNK_BYTES, MOST_BYTES = 64 << 20, 6 << 30

# raise: an error of the task's own. kill, stop: SIGKILL and SIGSTOP to its own process. hang: no answer, no work.
# memory: takes more and more, up to MOST_BYTES. misshapen: a table of other columns. write: the process that writes a
# table dies when its file is there and nobody was told of it; its task is the name of the table.
Kind = Literal["raise", "kill", "stop", "hang", "memory", "misshapen", "write"]
Point = Literal["answers", "files", "manifest"]  # answers are there; then their files are; then their manifest is


@dataclass(frozen=True, slots=True)
class Fault:
    """``task`` goes wrong ``times`` times; None: always."""

    task: str
    kind: Kind
    times: int | None = 1
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """The driver waits at a point of its ``commit``-th commit until it is released or killed."""

    point: Point
    commit: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """``folder``: the run folder. ``state``: journal and markers, on the disk of every process. ``seconds``: of a task;
    with an ``order`` they differ between tasks, and so does the order in which these end. ``gate``: at its second task
    a process waits for the marker "open", so that who wants to disturb finds all of them at work.
    """

    folder: str
    state: str
    tasks: int = 12
    positions: int = 150
    seconds: float = 0.2
    order: int | None = None
    gate: bool = False
    groups: int = 2
    min_groups: int = 1
    ranks: int = 1
    cpus: int = 1  # of a rank
    faults: tuple[Fault, ...] = ()
    pauses: tuple[Pause, ...] = ()
    policy: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Trial:
        written = json.loads(path.read_text(encoding="utf-8"))
        written["faults"] = tuple(Fault(**fault) for fault in written["faults"])
        written["pauses"] = tuple(Pause(**pause) for pause in written["pauses"])
        return Trial(**written)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def measure(self) -> list[Task]:
        """The tasks; tables of theirs are too large to travel with the answer, so that they lie in an object store."""
        return [
            Task(
                id=f"effects-{i:04d}",
                kind="measure",
                positions=(np.arange(1, 1 + self.positions + i % 3),),
                layers=LAYERS,
                flops=1.0 + i % 3,
                rows=(TOP_K + 1) * len(LAYERS) * (self.positions + i % 3),
            )
            for i in range(self.tasks)
        ]


class TrialWorker:
    """Answers a task with its tables, after the time it should take, unless a fault is due."""

    def __init__(self, trial: Trial, folder: str, place: Place) -> None:
        self._trial, self._rank, self._begun = trial, place.rank, 0

    def serve(self) -> None:
        pass

    def run(self, task: Task, attempt: int) -> Output:
        self._note("begun", task.id)
        self._begun += 1
        while self._trial.gate and self._begun == 2 and not Path(self._trial.state, "open").exists():
            time.sleep(0.02)
        struck = strike(self._trial, task.id, self._rank)
        time.sleep(self._seconds(task.id))
        found = tables(task)
        if struck == "misshapen":
            found["effects"] = found["effects"].drop_columns(["kl", "tv"])
        self._note("ended", task.id)
        changes = {layer: (len(task.positions[0]), int(layer == 3)) for layer in LAYERS}
        return Output({"routing_changes": changes}, found)

    def _seconds(self, task: str) -> float:
        if self._trial.order is None:
            return self._trial.seconds
        return float(np.random.default_rng([self._trial.order, _number(task)]).uniform(0, 2 * self._trial.seconds))

    def _note(self, what: str, task: str) -> None:
        record = {"time": time.time(), "pid": os.getpid(), "what": what, "task": task, "rank": self._rank}
        with open(Path(self._trial.state, f"journal-{os.getpid()}.jsonl"), "a", encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")


def strike(trial: Trial, task: str, rank: int = 0) -> Kind | None:
    """Suffer what is due for a task; returns what the caller has to suffer itself."""
    for number, fault in enumerate(trial.faults):
        if (fault.task, fault.rank) == (task, rank) and _claim(trial, number, fault.times):
            if fault.kind == "raise":
                raise RuntimeError(f"{task} was told to fail")
            if fault.kind in ("kill", "write"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault.kind == "hang":
                time.sleep(3600)
            if fault.kind == "memory":
                _take_memory()
            return fault.kind
    return None


def _claim(trial: Trial, number: int, times: int | None) -> bool:
    """Whether the fault is to happen once more; the marker's time tells when it did."""
    count = 0
    while times is None or count < times:
        try:
            Path(trial.state, f"fault-{number}-{count}").touch(exist_ok=False)
        except FileExistsError:
            count += 1
        else:
            return True
    return False


def _take_memory() -> None:
    taken: list[np.ndarray] = []
    while len(taken) * CHUNK_BYTES < MOST_BYTES:
        taken.append(np.ones(CHUNK_BYTES, np.uint8))
        time.sleep(0.05)
    raise RuntimeError(f"{MOST_BYTES} bytes were taken and nobody minded")


def _number(task: str) -> int:
    return int(task.rpartition("-")[2])


def tables(task: Task) -> dict[str, pa.Table]:
    """Two active experts and one identity row per position and layer; the last position has no next token."""
    random = np.random.default_rng(zlib.crc32(task.id.encode()))
    sequence = _number(task.id)
    positions = np.asarray(task.positions[0])
    position, layer, slot = (a.ravel() for a in np.meshgrid(positions, LAYERS, np.arange(TOP_K + 1), indexing="ij"))
    n, identity = len(position), slot == TOP_K
    size = np.where(identity, 1e-7, 10.0 ** random.normal(-3, 2, n))
    loss = np.where(position == positions[-1], np.nan, size * random.normal(size=n))
    effects = {
        "document": np.full(n, sequence // 2),
        "sequence": np.full(n, sequence),
        "position": position,
        "layer": layer,
        "unit": np.where(identity, "identity", "expert"),
        "expert": pa.array(random.integers(EXPERTS, size=n), mask=identity),
        "slot": pa.array(slot, mask=identity),
        "intervention": np.where(identity, "scale", "zero"),
        "target": pa.array(["each"] * n, mask=identity),
        "scope": ["token"] * n,
        "parameter": pa.array(np.ones(n), mask=~identity),
        "routing_weight": random.random(n),
        "contribution_norm": random.random(n),
        "gap_norm": size,
        "delta_loss": pa.array(loss, from_pandas=True),
        "kl": size,
        "js": size / 4,
        "tv": np.sqrt(size / 2).clip(max=1),
        "top1_flip": size > 1e-2,
        "delta_logit": pa.array(-loss, from_pandas=True),
    }
    m = len(positions)
    tokens = {
        "document": [sequence // 2] * m,
        "sequence": [sequence] * m,
        "position": positions,
        "sentence": [0] * m,
        "domain": ["prose"] * m,
        "token_id": random.integers(100, size=m),
        "target_id": pa.array(positions, mask=positions == positions[-1]),
        "baseline_entropy": random.random(m),
    }
    return {"effects": _table(effects, n, EFFECTS), "tokens": _table(tokens, m, TOKENS)}


def _table(columns: Mapping[str, object], rows: int, schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(columns[f.name]).cast(f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
