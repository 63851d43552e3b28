"""How far a stage has come, how fast it goes and how long it will take, from the tasks' predicted costs."""

from __future__ import annotations

from typing import Any

from cluster.driver.ledger import Ledger


class Meter:
    """Measures what this process does; what an earlier one committed counts as done, not as speed.

    ``flops_per_second``: what a group is predicted to do. ``later``: predicted operations of the stages to come. Every
    call takes constant time.
    """

    def __init__(self, ledger: Ledger, flops_per_second: float, later: float = 0.0) -> None:
        self._ledger, self._predicted, self._later = ledger, flops_per_second, later
        self._start: float | None = None
        self._latest = 0.0
        self._busy = 0.0
        self._cost_before, self._rows_before = ledger.finished_cost, ledger.finished_rows

    def begin(self, now: float) -> None:
        """A task starts; before the first one groups were loading, which is no part of the rate."""
        if self._start is None:
            self._start = self._latest = now

    def answered(self, now: float, seconds: float) -> None:
        """A group took so many seconds for a task that has an answer now."""
        self._latest = now  # the rate is that up to the latest answer: it does not sink while a task runs
        self._busy += seconds

    def _group_seconds(self) -> float:
        """What one group alone would need for the rest of this stage: as measured, and as predicted until it is."""
        worked = self._ledger.finished_cost - self._cost_before
        rate = worked / self._busy if worked > 0 and self._busy > 0 else self._predicted
        return self._ledger.unfinished_cost / rate

    @property
    def group_seconds_left(self) -> float:
        """What one group alone would need for this stage and the later ones."""
        return self._group_seconds() + self._later / self._predicted

    def figures(self, groups: int) -> dict[str, Any]:
        """What :class:`cluster.display.Status` tells of the work, that so many groups share."""
        ledger = self._ledger
        worked = ledger.finished_cost - self._cost_before > 0
        seconds = self._latest - (self._latest if self._start is None else self._start)
        return {
            "tasks": len(ledger.tasks),
            "waiting": ledger.waiting,
            "running": ledger.running,
            "answered": ledger.answered,
            "committed": ledger.committed,
            "quarantined": len(ledger.quarantined),
            "share": ledger.finished_cost / ledger.cost if ledger.cost else 1.0,
            "rows": ledger.finished_rows,
            "rows_per_second": (ledger.finished_rows - self._rows_before) / seconds if worked and seconds > 0 else None,
            "seconds_left": self._group_seconds() / max(1, groups) if worked else None,
            "group_seconds_left": self.group_seconds_left,
        }
