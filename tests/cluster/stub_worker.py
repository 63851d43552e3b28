"""A worker without a model: tables of the public schemas from a seeded generator, and faults on demand.

What this module imports, every rank does, so that what drivers need is beside it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from audit.storage import Storage
from benchmarks.faults.trial import LAYERS, tables
from cluster.driver.group import Place
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
