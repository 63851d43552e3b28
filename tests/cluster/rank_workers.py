"""Workers of groups of several ranks, in a module that Ray's processes can import."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass
class DiesOnce:
    """Makes the job's own worker, whose rank 1 is killed in its third task, once."""

    make_worker: Callable[[str, Place], Worker]
    marker: str

    def __call__(self, folder: str, place: Place) -> Worker:
        worker = self.make_worker(folder, place)
        run, ran = worker.run, []

        def dying(task: Task, attempt: int) -> Output:
            ran.append(task.id)
            if place.rank == 1 and len(ran) == 3 and not Path(self.marker).exists():
                Path(self.marker).touch()
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return run(task, attempt)

        worker.run = dying  # type: ignore[method-assign]
        return worker


def refuse(place: Place) -> Worker:
    raise ValueError("model.source: is gone")


def slow(folder: str, place: Place) -> Worker:
    return StubWorker(folder, place, seconds=30.0)
