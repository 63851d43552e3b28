"""Stand-ins for what a driver holds: groups and a committer in this process, with a clock of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from cluster.display import NoDisplay, Status
from cluster.driver.commits import ResultsLostError
from cluster.driver.group import Group, GroupUnreachableError, Result, TaskError
from cluster.tasks import Attempt


class Hang(Exception):
    """In a plan of answers: never answer."""


@dataclass(eq=False)
class FakeGroup:
    name: str
    fleet: FakeFleet
    node: str = ""
    questions: list[tuple[str, int]] = field(default_factory=list)  # what it was asked last and how often it was tried
    dead: bool = False

    def load(self) -> None:
        self.node = f"10.0.0.{1 + len(self.fleet.launched)}"
        self.ask([("load", 0)])

    def ping(self) -> None:
        self.ask([("ping", 0)])

    def submit(self, attempts: Sequence[Attempt]) -> None:
        assert len(attempts) <= self.fleet.side_by_side
        self.fleet.submitted += [(task.id, number, self.name) for task, number in attempts]
        self.ask([(task.id, number) for task, number in attempts])
        running = sum(group.running for group in self.fleet.open)
        for task, _ in attempts:
            self.fleet.most_running[task.id] = max(self.fleet.most_running.get(task.id, 0), running)

    def ask(self, what: list[tuple[str, int]]) -> None:
        assert not self.dead, "asked a group that was ended"
        assert not self.questions, "asked a group that had not answered"
        self.questions = what
        self.fleet.open.append(self)

    @property
    def running(self) -> int:
        return sum(number > 0 for _, number in self.questions)

    @property
    def faults(self) -> list[Exception | None]:
        return [self.fleet.faults.get(question) for question in self.questions]

    def answer(self) -> Any:
        questions, faults = self.questions, self.faults
        self.questions = []
        for question, fault in zip(questions, faults, strict=True):
            if question[1] == 0 or isinstance(fault, GroupUnreachableError):
                self.fleet.faults.pop(question, None)  # happens once
        for (_, number), fault in zip(questions, faults, strict=True):
            if fault is not None and (number == 0 or not isinstance(fault, TaskError)):
                raise fault
        answers = [
            fault or Result(what, {"rows": {}, "bytes": 1}, {})
            for (what, _), fault in zip(questions, faults, strict=True)
        ]
        return None if questions[0][1] == 0 else answers

    def kill(self) -> None:
        self.dead = True
        if self in self.fleet.open:
            self.fleet.open.remove(self)


@dataclass(eq=False)
class FakeFleet:
    """Answers the oldest question first. ``faults``: (task id, attempt) or ("place", "load" or "ping", 0) -> raised."""

    faults: dict[tuple[str, int], Exception] = field(default_factory=dict)
    most: int | None = None
    side_by_side: int = 1
    writes: bool = True
    now: float = 0.0
    submitted: list[tuple[str, int, str]] = field(default_factory=list)
    launched: list[FakeGroup] = field(default_factory=list)
    most_running: dict[str, int] = field(default_factory=dict)
    open: list[FakeGroup] = field(default_factory=list)

    def launch(self, name: str) -> Group:
        group = FakeGroup(name, self)
        self.launched.append(group)
        group.ask([("place", 0)])
        return group

    def wait(self, seconds: float) -> list[FakeGroup]:
        answered = [group for group in self.open if not any(isinstance(f, Hang) for f in group.faults)][:1]
        self.now += 0.01 if answered else seconds
        for group in answered:
            self.open.remove(group)
        return answered

    def capacity(self) -> int | None:
        return self.most

    def can_write(self) -> bool:
        return self.writes

    def wants(self, groups: int) -> str:
        return f"{groups} groups need what there is not"

    @property
    def alive(self) -> int:
        return sum(not group.dead for group in self.launched)


@dataclass(eq=False)
class FakeCommitter:
    commits: list[list[str]] = field(default_factory=list)
    lose_once: tuple[str, ...] = ()

    def commit(self, results: Sequence[Result]) -> None:
        if self.lose_once:
            lost, self.lose_once = self.lose_once, ()
            raise ResultsLostError(lost)
        self.commits.append([result.task for result in results])


class TakesNoTime(Executor):
    """In place of the committer's thread, whose seconds are not those of the fleet's clock."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Watch(NoDisplay):
    """Keeps every status and sentence; ``told`` is called with each status."""

    told: Callable[[Status], None] = lambda status: None
    seen: list[Status] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def show(self, status: Status) -> None:
        self.seen.append(status)
        self.told(status)

    def say(self, text: str) -> None:
        self.said.append(text)
