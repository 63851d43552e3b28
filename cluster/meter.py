"""How far a stage has come, how fast it goes and how long it will take, from the tasks' predicted costs."""

from __future__ import annotations

from cluster.display import Status
from cluster.ledger import Ledger


class Meter:
    """Measures what this process does; what an earlier one committed counts as done, not as speed."""

    def __init__(self, ledger: Ledger) -> None:
        self._start: float | None = None
        self._latest = 0.0
        self._before = ledger.finished()
        self._seen = set(self._before)
        self._rows, self._cost = self._sums(ledger, self._before)
        self._rows_before, self._cost_before = self._rows, self._cost
        self._total = self._sums(ledger, set(ledger.tasks))[1]

    def begin(self, now: float) -> None:
        """A task starts; before the first one replicas were loading, which is no part of the rate."""
        if self._start is None:
            self._start = self._latest = now

    @staticmethod
    def _sums(ledger: Ledger, ids: set[str]) -> tuple[int, float]:
        # Every task has a price beyond its arithmetic, so that a stage of tasks without any still advances.
        return sum(ledger.tasks[i].rows for i in ids), sum(ledger.tasks[i].flops + 1.0 for i in ids)

    def status(self, stage: str, ledger: Ledger, now: float, replicas: int) -> Status:
        finished = ledger.finished()
        if finished != self._seen:  # the rate is that up to the latest answer: it does not sink while a task runs
            self._latest, self._seen = now, finished
            self._rows, self._cost = self._sums(ledger, finished)
        seconds = self._latest - (self._latest if self._start is None else self._start)
        worked = self._cost > self._cost_before
        gone = self._sums(ledger, set(ledger.quarantined))[1]
        left = self._total - gone - self._cost
        return Status(
            stage=stage,
            tasks_done=len(finished),
            tasks=len(ledger.tasks),
            share=self._cost / self._total,
            rows=self._rows,
            rows_per_second=(self._rows - self._rows_before) / seconds if worked and seconds > 0 else None,
            seconds_left=left * seconds / (self._cost - self._cost_before) if worked else None,
            replicas=replicas,
            quarantined=len(ledger.quarantined),
        )
