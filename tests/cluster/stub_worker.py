"""A worker without a model: tables of the public schemas from a seeded generator, and faults on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa

from audit.storage import Storage
from benchmarks.faults.trial import LAYERS, TOP_K, tables
from cluster.driver.driver import Policy
from cluster.driver.group import Place, Shape
from cluster.driver.scaling import Scale
from cluster.run import Job
from cluster.tasks import Task
from cluster.worker import Output

Fault = Literal["raise", "kill", "hang"]


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong in the process of a rank, by task id and attempt (0: at every attempt)."""

    faults: Mapping[tuple[str, int], Fault] = field(default_factory=dict)
    rank: int = 0

    def strike(self, task: str, attempt: int, rank: int) -> None:
        if rank != self.rank:
            return
        fault = self.faults.get((task, attempt)) or self.faults.get((task, 0))
        if fault == "raise":
            raise RuntimeError(f"{task} was told to fail")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)


@dataclass(frozen=True)
class StubWorker:
    folder: str
    place: Place
    plan: FaultPlan = FaultPlan()
    seconds: float = 0.0

    def serve(self) -> None:
        pass

    def run(self, task: Task, attempt: int) -> Output:
        self.plan.strike(task.id, attempt, self.place.rank)
        time.sleep(self.seconds)
        if task.kind == "measure":
            return Output(
                {"routing_changes": {layer: (len(task.positions[0]), int(layer == 3)) for layer in LAYERS}},
                tables(task),
            )
        name = f"observations/{task.id}-{os.getpid()}-{attempt}"
        storage = Storage(self.folder)
        merged = [f"{part}/sum" for part in task.inputs] if task.kind == "merge" else []
        read = [content.decode() for content in storage.read_many(merged)] or [task.id]
        storage.write(f"{name}/sum", "+".join(read).encode())
        return Output({"folder": name})


def make_job(
    *,
    tasks: int = 9,
    positions: int = 5,
    groups: int = 2,
    ranks: int = 1,
    plan: FaultPlan | None = None,
    seconds: float = 0.0,
    policy: Policy | None = None,
    calibration: int = 0,
    identity: Mapping[str, object] | None = None,
) -> Job:
    observe = [Task(id=f"observe-{i:04d}", kind="observe", rows=10, flops=10) for i in range(calibration)]
    merge = [Task(id="merge-calibration", kind="merge", inputs=tuple(t.id for t in observe))] if observe else []
    measure = [
        Task(
            id=f"effects-{i:04d}",
            kind="measure",
            positions=(np.arange(1, 1 + positions + i % 3),),
            layers=LAYERS,
            flops=1.0 + i % 3,
            rows=(TOP_K + 1) * len(LAYERS) * (positions + i % 3),
            inputs=tuple(t.id for t in merge),
        )
        for i in range(tasks)
    ]
    return Job(
        stages=(("observe", observe), ("merge", merge), ("effects", measure)),
        identity=identity or {"specification": {"seed": 0}},
        information={"specification": {}, "model": {"source": "stub"}},
        make_worker=partial(StubWorker, plan=plan or FaultPlan(), seconds=seconds),
        scale=Scale(max_groups=groups),
        shape=Shape(ranks=ranks),
        policy=policy or Policy(commit_results=4, relaunch_seconds=0.0),
    )


def rows_of(tables_: Sequence[pa.Table]) -> list[tuple[object, ...]]:
    """Rows as sorted tuples, to compare tables whose order has no meaning."""
    return sorted((tuple(row.values()) for table in tables_ for row in table.to_pylist()), key=repr)
