"""The ledger: which tasks wait, run, have an answer, are committed or were given up."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence

from cluster.tasks import Task


class Ledger:
    """Book-keeping of one stage; knows nothing of replicas or storage.

    A task is retried after an error. One that was running when its replica was lost is blamed: the first time it may be
    bad luck, from the second on it is a *suspect* and runs after all others and alone, so that it takes nobody with
    it. After ``max_attempts`` attempts it is quarantined.
    """

    def __init__(self, tasks: Sequence[Task], done: Collection[str], max_attempts: int) -> None:
        self.tasks = {task.id: task for task in tasks}
        assert len(self.tasks) == len(tasks), "task ids repeat"
        self._max_attempts = max_attempts
        self._committed = {id_ for id_ in self.tasks if id_ in done}
        # The longest first, so that no replica idles long at the end; ids make the order total.
        longest_first = sorted((t for t in tasks if t.id not in done), key=lambda t: (-t.flops, t.id))
        self._waiting = deque(task.id for task in longest_first)
        self._suspects: deque[str] = deque()
        self._running: set[str] = set()
        self._answered: set[str] = set()
        self._attempts: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self.quarantined: dict[str, str] = {}

    # What is left ----------------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """Tasks that still need a replica, running ones included."""
        return len(self._waiting) + len(self._suspects) + len(self._running)

    @property
    def complete(self) -> bool:
        return len(self._committed) + len(self.quarantined) == len(self.tasks)

    def finished(self) -> set[str]:
        """Ids of the tasks that have an answer, committed or about to be."""
        return self._committed | self._answered

    # Moves -----------------------------------------------------------------------------------------------------------

    def take(self) -> tuple[Task, int] | None:
        """The next task to run and the number of this attempt (from 1); None while there is nothing to hand out."""
        if self._waiting:
            id_ = self._waiting.popleft()
        elif self._suspects and not self._running:
            id_ = self._suspects.popleft()
        else:
            return None
        self._running.add(id_)
        return self.tasks[id_], self._attempts[id_] + 1

    def answer(self, id_: str) -> None:
        """The running task has a result, not yet committed."""
        self._running.remove(id_)
        self._answered.add(id_)

    def commit(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            self._answered.remove(id_)
            self._committed.add(id_)

    def forget(self, ids: Iterable[str]) -> None:
        """Results were lost before they were committed, by no fault of their tasks."""
        for id_ in ids:
            self._answered.remove(id_)
            self._waiting.append(id_)

    def put_back(self, id_: str) -> None:
        """The running task was interrupted by no fault of its own."""
        self._running.remove(id_)
        self._waiting.appendleft(id_)

    def fail(self, id_: str, error: str, *, replica_lost: bool) -> bool:
        """The running task failed, or its replica was lost under it; returns whether it is now quarantined."""
        self._running.remove(id_)
        self._attempts[id_] += 1
        self._losses[id_] += replica_lost
        if self._attempts[id_] >= self._max_attempts:
            self.quarantined[id_] = error
            return True
        (self._suspects if self._losses[id_] > 1 else self._waiting).append(id_)
        return False
