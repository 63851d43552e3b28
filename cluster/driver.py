"""The driver: hands tasks to replicas, replaces what fails, gives results to the committer.

All recovery is decided here, in one loop that reads like a program on one machine:

- a task that raises is tried again, then quarantined with the error's text;
- a lost replica is replaced; the task it was running is blamed (see ``cluster.ledger``), one not ready blames nobody;
- no answer within ``hang_seconds`` is a loss;
- too many losses in a row, or too many tasks given up, with nothing finished in between end the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from audit.runfolder import RunFolder
from cluster.display import Display
from cluster.ledger import Ledger
from cluster.meter import Meter
from cluster.replica import Fleet, Handle, Replica, ReplicaLostError, ReplicaUnreachableError, Result, TaskError
from cluster.tasks import Task

_WAIT_SECONDS = 0.5  # how long the loop may sleep: the delay of a stop signal and of the progress bar
_PROGRESS_SECONDS = 10.0  # between lines of progress.jsonl


class RunError(Exception):
    """The run cannot go on; what is committed stays. The message says why, in one sentence."""


class Stopped(Exception):
    """Somebody asked the run to stop, and what was finished is committed."""


class ResultsLostError(Exception):
    """Results were gone before they could be committed."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(f"the results of {len(tasks)} tasks were lost with the node that held them")
        self.tasks = tasks


class Committer(Protocol):
    def commit(self, results: Sequence[Result]) -> None:
        """Make the results durable, all or none; raises ResultsLostError naming those whose tables are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to give up and when to commit."""

    max_attempts: int = 3
    hopeless: int = 5  # so many quarantined tasks and not one result: it is not the tasks
    hang_seconds: float = 1800.0
    commit_results: int = 64
    commit_bytes: int = 256 << 20
    commit_seconds: float = 60.0
    relaunch_seconds: float = 1.0  # pause before a replacement, times the losses in a row


def last_line(error: str) -> str:
    """What a traceback says in the end."""
    return error.strip().splitlines()[-1]


@dataclass(slots=True, eq=False)
class _Seat:
    """A place for a replica: empty until ``due``, then starting (no task) or busy (task), or idle (no handle)."""

    number: int
    replica: Replica | None = None
    handle: Handle = None
    task: Task | None = None
    since: float = 0.0
    due: float = 0.0
    launches: int = 0


@dataclass(slots=True)
class _Pending:
    results: list[Result] = field(default_factory=list)
    bytes: int = 0
    since: float = 0.0


class Driver:
    """Runs stages of tasks on one fleet; its replicas, once loaded, serve every stage."""

    def __init__(
        self,
        fleet: Fleet,
        committer: Committer,
        folder: RunFolder,
        policy: Policy,
        display: Display,
        *,
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fleet, self._committer, self._folder = fleet, committer, folder
        self._policy, self._display = policy, display
        self._clock, self._stop = clock, stop
        self._seats = [_Seat(number) for number in range(fleet.size)]
        self._losses_in_a_row = 0
        self._thread = ThreadPoolExecutor(1, "committer")  # commits overlap with work
        self._commit: Future[None] | None = None
        self._in_commit: list[Result] = []
        self._pending = _Pending()
        self._progress_written = float("-inf")

    def run(self, stage: str, tasks: Sequence[Task], done: set[str]) -> Ledger:
        """Bring every task to a manifest or into quarantine; raises RunError, or Stopped when asked to stop."""
        ledger = Ledger(tasks, done, self._policy.max_attempts)
        meter = Meter(ledger)
        while not ledger.complete:
            if self._stop():
                self._display.say("stopping: what is finished is being committed")
                for seat in self._seats:  # they would compete with the commit; their answers outlive them
                    self._empty(seat)
                self._commit_everything(ledger)
                self._report(stage, ledger, meter, always=True)
                raise Stopped
            self._fill_seats(ledger, meter)
            self._collect(ledger)
            self._commit_when_due(ledger)
            self._report(stage, ledger, meter)
        self._report(stage, ledger, meter, always=True)
        return ledger

    def close(self) -> None:
        """End every replica."""
        for seat in self._seats:
            self._empty(seat)
        self._thread.shutdown(wait=True)

    # Replicas and their tasks ----------------------------------------------------------------------------------------

    def _fill_seats(self, ledger: Ledger, meter: Meter) -> None:
        now = self._clock()
        wanted = sum(seat.replica is not None for seat in self._seats)
        for seat in self._seats:
            if seat.replica is None and seat.due <= now and wanted < ledger.unfinished:
                seat.replica = self._fleet.launch(f"replica-{seat.number}.{seat.launches}")
                seat.launches, wanted = seat.launches + 1, wanted + 1
                seat.handle, seat.since = seat.replica.ping(), now
            elif seat.replica is not None and seat.handle is None and (taken := ledger.take()):
                seat.task, attempt = taken
                meter.begin(now)
                seat.handle, seat.since = seat.replica.submit(seat.task, attempt), now

    def _collect(self, ledger: Ledger) -> None:
        handles = [seat.handle for seat in self._seats if seat.handle is not None]
        ready = set(self._fleet.wait(handles, _WAIT_SECONDS))
        for seat in self._seats:
            if seat.handle is not None and seat.handle in ready:
                self._settle(seat, ledger)
            elif seat.handle is not None and self._clock() - seat.since > self._policy.hang_seconds:
                self._lose(seat, ledger, f"no answer within {self._policy.hang_seconds:g} seconds")

    def _settle(self, seat: _Seat, ledger: Ledger) -> None:
        """Take the answer a replica gave, whatever it is."""
        assert seat.replica is not None
        task, handle = seat.task, seat.handle
        try:
            answer = self._fleet.answer(handle)
        except ReplicaLostError as error:
            self._lose(seat, ledger, str(error))
            return
        except ReplicaUnreachableError as error:
            self._count_loss("a replica could not be reached", str(error))
            if task is not None:
                ledger.put_back(task.id)
            seat.task, seat.handle, seat.since = None, seat.replica.ping(), self._clock()
            return
        except TaskError as error:
            if task is None:
                self._folder.append("progress.jsonl", {"time": time.time(), "error": str(error)})
                raise RunError(f"a replica could not be made ready: {last_line(str(error))}") from None
            self._fail(ledger, task, str(error), replica_lost=False)
            seat.task = seat.handle = None
            if error.recycle:
                self._empty(seat)
            return
        seat.task = seat.handle = None
        if task is not None:
            assert isinstance(answer, Result)
            self._losses_in_a_row = 0
            ledger.answer(task.id)
            if not self._pending.results:
                self._pending.since = self._clock()
            self._pending.results.append(answer)
            self._pending.bytes += int(answer.receipt.get("bytes", 0))

    def _lose(self, seat: _Seat, ledger: Ledger, reason: str) -> None:
        task = seat.task
        self._empty(seat)
        if task is not None:
            self._fail(ledger, task, reason, replica_lost=True)
        if task is None or task.id not in ledger.quarantined:
            self._count_loss("a replica was lost", reason)
        seat.due = self._clock() + self._policy.relaunch_seconds * self._losses_in_a_row

    def _fail(self, ledger: Ledger, task: Task, error: str, *, replica_lost: bool) -> None:
        if ledger.fail(task.id, error, replica_lost=replica_lost):
            self._losses_in_a_row = 0  # it was the task
            attempts = self._policy.max_attempts
            record = {"task": task.id, "time": time.time(), "attempts": attempts, "error": error}
            self._folder.append("quarantine.jsonl", record)
            self._display.say(f"{task.id} is quarantined after {attempts} attempts: {last_line(error)}")
            if len(ledger.quarantined) >= self._policy.hopeless and not ledger.finished():
                raise RunError(f"the first {len(ledger.quarantined)} tasks all failed; the last: {last_line(error)}")

    def _count_loss(self, what: str, reason: str) -> None:
        self._losses_in_a_row += 1
        self._display.say(f"{what}: {reason.strip().splitlines()[0]}")
        if self._losses_in_a_row > 2 * len(self._seats) * self._policy.max_attempts:
            count = f"{self._losses_in_a_row} losses in a row with no task finished in between"
            raise RunError(f"{count}; the last: {what}: {reason}")

    @staticmethod
    def _empty(seat: _Seat) -> None:
        if seat.replica is not None:
            seat.replica.kill()
        seat.replica = seat.handle = seat.task = None

    # Commits ---------------------------------------------------------------------------------------------------------

    def _commit_when_due(self, ledger: Ledger) -> None:
        if self._commit is not None and self._commit.done():
            self._settle_commit(ledger)
        pending, policy = self._pending, self._policy
        due = (
            len(pending.results) >= policy.commit_results
            or pending.bytes >= policy.commit_bytes
            or self._clock() - pending.since >= policy.commit_seconds
            or not ledger.unfinished
        )
        if self._commit is None and pending.results and due:
            self._begin_commit()

    def _begin_commit(self) -> None:
        self._in_commit, self._pending = self._pending.results, _Pending()
        self._commit = self._thread.submit(self._committer.commit, self._in_commit)

    def _settle_commit(self, ledger: Ledger) -> None:
        assert self._commit is not None
        commit, results = self._commit, self._in_commit
        self._commit, self._in_commit = None, []
        try:
            commit.result()
        except ResultsLostError as error:
            self._count_loss("results were lost", str(error))
            ledger.forget(error.tasks)
            kept = [result for result in results if result.task not in error.tasks]
            self._pending.results = kept + self._pending.results
            return
        ledger.commit(result.task for result in results)

    def _commit_everything(self, ledger: Ledger) -> None:
        """What has an answer now; results that are lost on the way are simply run again next time."""
        if self._commit is not None:
            self._settle_commit(ledger)
        if self._pending.results:
            self._begin_commit()
            self._settle_commit(ledger)

    # Telling ---------------------------------------------------------------------------------------------------------

    def _report(self, stage: str, ledger: Ledger, meter: Meter, *, always: bool = False) -> None:
        now = self._clock()
        status = meter.status(stage, ledger, now, replicas=sum(seat.replica is not None for seat in self._seats))
        self._display.show(status)
        if always or now - self._progress_written >= _PROGRESS_SECONDS:
            self._progress_written = now
            self._folder.append("progress.jsonl", {"time": time.time(), **status.record()})
