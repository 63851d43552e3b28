"""Commits on their way: results are gathered, and written by a thread of their own while groups go on working."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from cluster.driver.group import Result


class ResultsLostError(Exception):
    """Results were gone before they could be committed."""

    def __init__(self, tasks: Sequence[str]) -> None:
        count = "1 task was" if len(tasks) == 1 else f"{len(tasks)} tasks were"
        super().__init__(f"what {count} answered by is lost with the node that held it")
        self.tasks = tasks


class Committer(Protocol):
    def commit(self, results: Sequence[Result]) -> None:
        """Make the results durable, all or none; raises ResultsLostError naming those whose tables are gone."""


class Commits:
    """One commit at a time, of what was gathered since the last began."""

    def __init__(
        self,
        committer: Committer,
        *,
        results: int,
        size: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._committer, self._clock = committer, clock
        self._results, self._size, self._seconds = results, size, seconds
        self._thread = ThreadPoolExecutor(1, "committer")
        self._pending: list[Result] = []
        self._bytes, self._since = 0, 0.0
        self._running: Future[None] | None = None
        self._began = 0.0
        self._written: list[Result] = []  # by the commit that runs

    def add(self, result: Result) -> None:
        if not self._pending:
            self._since = self._clock()
        self._pending.append(result)
        self._bytes += int(result.receipt.get("bytes", 0))

    def begin(self, *, at_once: bool = False) -> None:
        """Begin a commit where enough is gathered, or it has waited long enough, or there is no reason to wait."""
        due = (
            at_once
            or len(self._pending) >= self._results
            or self._bytes >= self._size
            or self._clock() - self._since >= self._seconds
        )
        if due and self._pending and self._running is None:
            self._written, self._pending, self._bytes = self._pending, [], 0
            self._began = self._clock()
            self._running = self._thread.submit(self._committer.commit, self._written)

    def finished(self, *, wait: bool = False) -> list[str]:
        """The tasks of a commit that is through now, once. Raises what it raised.

        After ResultsLostError the results that were not lost are gathered for the next one.
        """
        if self._running is None or not (wait or self._running.done()):
            return []
        running, written = self._running, self._written
        self._running, self._written = None, []
        try:
            running.result()
        except ResultsLostError as error:
            lost = set(error.tasks)
            for result in written:
                if result.task not in lost:
                    self.add(result)
            raise
        return [result.task for result in written]

    def running_for(self) -> float:
        """Seconds for which a commit has been running; 0 where none is."""
        return 0.0 if self._running is None else self._clock() - self._began

    def close(self) -> None:
        """Wait for the commit that runs, if any."""
        self._thread.shutdown(wait=True)
