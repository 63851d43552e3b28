"""The groups of a run and what each of them is doing: waiting for resources, loading, working, or idle."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.driver.group import Fleet, Group
from cluster.tasks import Attempt


@dataclass(frozen=True, slots=True)
class Question:
    """What a group was asked, and when."""

    kind: Literal["place", "load", "ping", "tasks"]
    since: float
    attempts: tuple[Attempt, ...] = ()


class Pool:
    """Launches, asks and ends groups. Only giving some back and looking for late ones takes longer with more groups."""

    def __init__(self, fleet: Fleet, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._clock = fleet, clock
        self._launches = 0
        self._waiting: dict[Group, Question] = {}  # for resources; these three in the order in which they were asked
        self._asked: dict[Group, Question] = {}
        self._idle: dict[Group, float] = {}
        self.loading = 0
        self.most = 0  # groups held at one time so far

    # Counts ----------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        return len(self._waiting) + len(self._asked) + len(self._idle)

    @property
    def waiting(self) -> int:
        """Groups that wait for resources."""
        return len(self._waiting)

    @property
    def ready(self) -> int:
        """Groups that have loaded the model."""
        return len(self._asked) + len(self._idle) - self.loading

    @property
    def asked(self) -> bool:
        """Whether anything will be answered."""
        return bool(self._waiting or self._asked)

    # A group's life --------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        group = self._fleet.launch(f"group-{self._launches}")
        self._launches += 1
        self._waiting[group] = Question("place", self._clock())
        self.most = max(self.most, self.held)

    def load(self, group: Group) -> None:
        self._asked[group] = Question("load", self._clock())
        self.loading += 1
        group.load()

    def ping(self, group: Group) -> None:
        self._asked[group] = Question("ping", self._clock())
        group.ping()

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Hand tasks to an idle group."""
        group, _ = self._idle.popitem()  # the one that was idle for the shortest: others can be given back
        self._asked[group] = Question("tasks", self._clock(), tuple(attempts))
        group.submit(attempts)

    def rest(self, group: Group) -> None:
        """The group has nothing to do."""
        self._idle[group] = self._clock()

    @property
    def idle(self) -> int:
        return len(self._idle)

    def answered(self, seconds: float) -> Iterator[tuple[Group, Question]]:
        """Groups that have an answer to their question, after at most so many seconds; then they belong nowhere."""
        for group in self._fleet.wait(seconds):
            question = self._waiting.pop(group, None) or self._asked.pop(group, None)
            if question is not None:  # else it was ended in the meantime
                self.loading -= question.kind == "load"
                yield group, question

    def overdue(self, limit: Callable[[Question], float]) -> Iterator[tuple[Group, Question]]:
        """Groups that have not answered within so many seconds since they were asked; waiting for resources is free."""
        now = self._clock()
        for group, question in list(self._asked.items()):
            if now - question.since <= limit(question):
                continue
            del self._asked[group]
            self.loading -= question.kind == "load"
            yield group, question

    # Fewer groups ----------------------------------------------------------------------------------------------------

    def release(self, count: int) -> None:
        """Give so many groups back, or as many as have no task: first those that are furthest from work."""
        loading = [group for group, question in self._asked.items() if question.kind == "load"] if count > 0 else []
        for group in [*reversed(self._waiting), *reversed(loading), *self._idle_by_node()][: max(0, count)]:
            self._forget(group)
            group.kill()

    def release_idle(self, seconds: float) -> None:
        """Give those back that have been idle for so long."""
        for group, since in list(self._idle.items()):
            if self._clock() - since < seconds:
                return
            self._forget(group)
            group.kill()

    def close(self) -> None:
        """End every group."""
        for group in [*self._waiting, *self._asked, *self._idle]:
            self._forget(group)
            group.kill()

    def _forget(self, group: Group) -> None:
        self._waiting.pop(group, None)
        self._idle.pop(group, None)
        question = self._asked.pop(group, None)
        self.loading -= question is not None and question.kind == "load"

    def _idle_by_node(self) -> list[Group]:
        """Idle groups, those first on whose node the fewest are: a node ends when its last group is given back."""
        if not self._idle:
            return []
        groups = Counter(group.node for group in (*self._asked, *self._idle))
        return sorted(self._idle, key=lambda group: groups[group.node])
