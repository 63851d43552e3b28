"""Groups without a model: objects in the driver's own process that answer at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.driver.group import Place, Result
from cluster.tasks import Attempt, Task
from cluster.worker import Output

LAYERS = tuple(range(16))


def make_tasks(count: int) -> list[Task]:
    """Tasks as the planner makes them: 64 positions of a sequence at every layer, a cost and a number of rows."""
    return [
        Task(
            id=f"effects-{number:08d}",
            kind="measure",
            positions=(np.arange(64),),
            layers=LAYERS,
            rows=8192,
            flops=1e12 + number % 977,
        )
        for number in range(count)
    ]


@dataclass(eq=False, slots=True)
class StubGroup:
    """Answers as soon as it is asked."""

    name: str
    ready: list[StubGroup]
    node: str = "here"
    held: Any = None

    def load(self) -> None:
        self._answer_with(None)

    def ping(self) -> None:
        self._answer_with(None)

    def submit(self, attempts: Sequence[Attempt]) -> None:
        self._answer_with([_result(task) for task, _ in attempts])

    def answer(self) -> Any:
        return self.held

    def kill(self) -> None:
        self.held = None

    def _answer_with(self, answer: Any) -> None:
        self.held = answer
        self.ready.append(self)


def _result(task: Task) -> Result:
    receipt = {"rows": {"effects": task.rows}, "bytes": 100 * task.rows, "method": "sweep", "micro_batch": 2048}
    return Result(task.id, receipt, {})


@dataclass(slots=True)
class StubFleet:
    """Room for ``groups`` of them."""

    groups: int
    side_by_side: int = 1
    ready: list[StubGroup] = field(default_factory=list)

    def launch(self, name: str) -> StubGroup:
        group = StubGroup(name, self.ready)
        self.ready.append(group)  # placed
        return group

    def wait(self, seconds: float) -> Collection[StubGroup]:
        found = list(self.ready)
        self.ready.clear()
        return found

    def capacity(self) -> int | None:
        return self.groups

    def can_write(self) -> bool:
        return True

    def wants(self, groups: int) -> str:
        return f"{groups} stub groups"


class NoWork:
    """A worker, for a group on Ray, whose tasks have neither work nor rows."""

    def __init__(self, place: Place) -> None:
        pass

    def serve(self) -> None:
        pass

    def run(self, task: Task, attempt: int) -> Output:
        return Output({})


class SeenTasks:
    """Everything is durable already; every task comes once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def commit(self, results: Sequence[Result]) -> None:
        names = {result.task for result in results}
        assert len(names) == len(results)
        assert not names & self.seen
        self.seen |= names
