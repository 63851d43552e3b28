"""Workers of groups of several ranks, in a module that Ray's processes can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stub_worker import StubWorker, tables

from cluster.driver.group import Place
from cluster.tasks import Task
from cluster.worker import Output, Worker


class Together:
    """Two ranks that add up what each of them brings: a task needs both."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def serve(self) -> None:
        pass

    def run(self, task: Task, attempt: int) -> Output:
        if task.id == "raise" and self.place.rank == 1:
            raise ValueError("rank 1 does not want to")
        if task.id == "kill" and self.place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.tensor([float(self.place.rank + 1)])
        dist.all_reduce(total)
        effects = tables(Task(id="effects-0000", kind="measure", positions=(np.arange(1, 6),)))["effects"]
        short = task.id == "disagree" and self.place.rank == 1
        return Output({"sum": float(total)}, {"effects": effects.slice(1) if short else effects})


class Apart:
    """Ranks with tasks of their own: each waits until all have begun, and tells how many had none."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def serve(self) -> None:
        self._idle(1.0)

    def run(self, task: Task, attempt: int) -> Output:
        if task.id == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        served = self._idle(0.0)
        if task.id == "raise":
            raise ValueError("there is no such task")
        return Output({"rank": self.place.rank, "served": served})

    @staticmethod
    def _idle(mine: float) -> float:
        total = torch.tensor([mine])
        dist.all_reduce(total)
        return float(total)


@dataclass
class DiesOnce:
    """Makes the job's own worker, whose rank 1 is killed in the middle of a sweep, once."""

    make_worker: Callable[[str, Place], Worker]
    marker: str

    def __call__(self, folder: str, place: Place) -> Worker:
        worker: Any = self.make_worker(folder, place)
        shard = worker._engine.model.shard
        visit, visited = shard.visit, []

        def dying(layer: int) -> Any:
            visited.append(layer)
            if place.rank == 1 and len(visited) == 3 and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return visit(layer)

        shard.visit = dying
        return worker  # type: ignore[no-any-return]


def refuse(place: Place) -> Worker:
    raise ValueError("model.source: is gone")


def slow(folder: str, place: Place) -> Worker:
    return StubWorker(folder, place, seconds=30.0)
