"""The ledger: which tasks wait, run, have an answer, are committed or were given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence

from cluster.tasks import Attempt, Task


class Ledger:
    """Book-keeping of one stage; knows nothing of groups or storage. Every move and every count takes constant time.

    A task is retried after an error. One that was running when its group was lost is blamed: the first time it may be
    bad luck, from the second on it is a *suspect* and runs after all others and alone, so that it takes nobody with
    it. After ``max_attempts`` attempts it is quarantined.
    """

    def __init__(self, tasks: Sequence[Task], done: Container[str], max_attempts: int) -> None:
        self.tasks = {task.id: task for task in tasks}
        assert len(self.tasks) == len(tasks), "task ids repeat"
        self._max_attempts = max_attempts
        # The longest first, so that no group idles long at the end; ids make the order total.
        longest_first = sorted((t for t in tasks if t.id not in done), key=lambda t: (-t.flops, t.id))
        self._waiting = deque(task.id for task in longest_first)
        self._suspects: deque[str] = deque()
        self._running: set[str] = set()
        self._answered: set[str] = set()
        self._attempts: dict[str, int] = {}  # of tasks that failed, as for the next one
        self._losses: dict[str, int] = {}
        self.quarantined: dict[str, str] = {}  # with the error of the last attempt
        self.committed = len(tasks) - len(longest_first)
        # Predicted costs and rows: of the stage, of the tasks that have a result, of those that were given up.
        self.cost = sum(map(_cost, tasks))
        self.finished_cost = sum(_cost(task) for task in tasks if task.id in done)
        self.finished_rows = sum(task.rows for task in tasks if task.id in done)
        self._lost_cost = 0.0

    # What is left ----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._suspects)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def answered(self) -> int:
        """Tasks that have a result, not yet committed."""
        return len(self._answered)

    @property
    def finished(self) -> int:
        """Tasks that have a result, committed or about to be."""
        return self.committed + len(self._answered)

    @property
    def unfinished(self) -> int:
        """Tasks that still need a group, running ones included."""
        return self.waiting + self.running

    @property
    def at_once(self) -> int:
        """How many tasks could be running now, those that are included."""
        return len(self._waiting) + self.running or min(1, len(self._suspects))

    @property
    def unfinished_cost(self) -> float:
        """Of the tasks that still need a group."""
        return max(0.0, self.cost - self.finished_cost - self._lost_cost)

    @property
    def complete(self) -> bool:
        return self.committed + len(self.quarantined) == len(self.tasks)

    def is_suspect(self, id_: str) -> bool:
        return self._losses.get(id_, 0) > 1

    # Moves -----------------------------------------------------------------------------------------------------------

    def take(self) -> Attempt | None:
        """The next task to run; None while there is nothing to hand out."""
        if self._waiting:
            id_ = self._waiting.popleft()
        elif self._suspects and not self._running:
            id_ = self._suspects.popleft()
        else:
            return None
        self._running.add(id_)
        return Attempt(self.tasks[id_], self._attempts.get(id_, 0) + 1)

    def answer(self, id_: str) -> None:
        """The running task has a result, not yet committed."""
        self._running.remove(id_)
        self._answered.add(id_)
        self.finished_cost += _cost(self.tasks[id_])
        self.finished_rows += self.tasks[id_].rows

    def commit(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            self._answered.remove(id_)
            self.committed += 1

    def forget(self, ids: Iterable[str]) -> None:
        """Results were lost before they were committed, by no fault of their tasks."""
        for id_ in ids:
            self._answered.remove(id_)
            self._waiting.append(id_)
            self.finished_cost -= _cost(self.tasks[id_])
            self.finished_rows -= self.tasks[id_].rows

    def put_back(self, id_: str) -> None:
        """The running task was interrupted by no fault of its own."""
        self._running.remove(id_)
        (self._suspects if self.is_suspect(id_) else self._waiting).appendleft(id_)

    def fail(self, id_: str, error: str, *, group_lost: bool) -> bool:
        """The running task failed, or its group was lost under it; returns whether it is now quarantined."""
        self._running.remove(id_)
        self._attempts[id_] = self._attempts.get(id_, 0) + 1
        self._losses[id_] = self._losses.get(id_, 0) + group_lost
        if self._attempts[id_] >= self._max_attempts:
            self.quarantined[id_] = error
            self._lost_cost += _cost(self.tasks[id_])
            return True
        (self._suspects if self.is_suspect(id_) else self._waiting).append(id_)
        return False


def _cost(task: Task) -> float:
    # Every task has a price beyond its arithmetic, so that a stage of tasks without any still advances.
    return task.flops + 1.0
