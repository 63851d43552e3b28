"""The driver: holds as many groups as the work needs, hands tasks to them, replaces what fails, commits what comes.

All recovery is decided here, in one loop that reads like a program on one machine:

- a task that raises is tried again, then quarantined with the error's text;
- a lost group is replaced; the tasks it was running are blamed (see ``ledger``), one not ready blames nobody;
- no answer within ``hang_seconds``, or ``load_seconds`` of loading, is a loss, waiting for resources is not;
- too many losses in a row, or too many tasks given up, with nothing finished in between end the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from audit.runfolder import RunFolder
from cluster.display import Display, Status
from cluster.driver.commits import Commits, Committer, ResultsLostError
from cluster.driver.group import Fleet, Group, GroupLostError, GroupUnreachableError, TaskError
from cluster.driver.ledger import Ledger
from cluster.driver.losses import Fate, Loss, last_line
from cluster.driver.meter import Meter
from cluster.driver.pool import Pool, Question
from cluster.driver.scaling import Scale, groups_wanted
from cluster.tasks import Attempt, Task

_WAIT_SECONDS = 0.5  # how long the loop may sleep: the delay of a stop signal
_COMMIT_SECONDS = 0.05  # and where only a commit is waited for
_SHOW_SECONDS = 0.1  # between two looks at the bar
_PROGRESS_SECONDS = 10.0  # between lines of progress.jsonl
_IDLE_SECONDS = 60.0  # how long a group is kept that only a later stage has tasks for
_SHORTAGE_SECONDS = 30.0, 300.0  # until it is said that groups wait for resources, and between two times
_LATE_SECONDS = 1.0  # between two looks for groups that should have answered
_STARVED_SECONDS = 30.0  # so long a commit may run before it is asked whether it has a CPU, and between two times


class RunError(Exception):
    """The run cannot go on; what is committed stays. The message says why, in one sentence."""


class Stopped(Exception):
    """Somebody asked the run to stop, and what was finished is committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to give up and when to commit."""

    max_attempts: int = 3
    hopeless: int = 5  # so many quarantined tasks and not one result: it is not the tasks
    hang_seconds: float = 1800.0  # for a task, or a sign of life
    load_seconds: float = 3600.0  # for loading the model
    commit_results: int = 64
    commit_bytes: int = 256 << 20
    commit_seconds: float = 60.0
    relaunch_seconds: float = 1.0  # pause before a replacement, times the losses in a row


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    ledger: Ledger
    meter: Meter
    later: int  # tasks of the stages to come


class Driver:
    """Runs stages of tasks on the groups of one fleet; a group that is loaded serves every stage.

    ``record`` is told every status that is shown.
    """

    def __init__(
        self,
        fleet: Fleet,
        committer: Committer,
        folder: RunFolder,
        policy: Policy,
        scale: Scale,
        display: Display,
        *,
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], bool] = lambda: False,
        record: Callable[[Status], None] = lambda status: None,
    ) -> None:
        self._fleet, self._folder, self._policy, self._scale = fleet, folder, policy, scale
        self._display, self._record, self._clock, self._stop = display, record, clock, stop
        self._pool = Pool(fleet, clock=clock)
        self._commits = Commits(
            committer,
            results=policy.commit_results,
            size=policy.commit_bytes,
            seconds=policy.commit_seconds,
            clock=clock,
        )
        self._begun = clock()
        self._losses = self._losses_in_a_row = 0
        self._most_groups: int | None = None
        self._say_shortage_at = self._begun + _SHORTAGE_SECONDS[0]
        self._launch_after = self._look_again = self._look_for_late_at = -math.inf
        self._shown = self._progress_written = -math.inf

    def run(self, name: str, tasks: Sequence[Task], done: Container[str], later: Sequence[Task] = ()) -> Ledger:
        """Bring every task to a manifest or into quarantine; raises RunError, or Stopped when asked to stop.

        ``later``: tasks of the stages to come, for which groups are worth keeping.
        """
        ledger = Ledger(tasks, done, self._policy.max_attempts)
        meter = Meter(ledger, self._scale.flops_per_second, sum(task.flops for task in later))
        stage = _Stage(name, ledger, meter, len(later))
        while not ledger.complete:
            if self._stop():
                self._end(stage)
            self._hold_groups(stage)
            self._hand_out(stage)
            for group, question in self._pool.answered(_WAIT_SECONDS if self._pool.asked else _COMMIT_SECONDS):
                self._settle(group, question, stage)
            self._end_late_groups(stage)
            self._commit(stage)
            self._report(stage)
        self._hold_groups(stage)
        self._report(stage, always=True)
        return ledger

    def close(self) -> None:
        """End every group."""
        self._pool.close()
        self._commits.close()

    # Groups ----------------------------------------------------------------------------------------------------------

    def _hold_groups(self, stage: _Stage) -> None:
        """Ask for groups that tasks wait for, give back those that nothing waits for."""
        pool, now, side_by_side = self._pool, self._clock(), self._fleet.side_by_side
        at_once = math.ceil(stage.ledger.at_once / side_by_side)
        wanted = groups_wanted(
            self._scale,
            group_seconds=stage.meter.group_seconds_left,
            elapsed=now - self._begun,
            tasks=at_once + math.ceil(stage.later / side_by_side),
            held=pool.held,
        )
        if (most := self._writers_share()) is not None:
            wanted = min(wanted, most)
        needed = min(wanted, at_once)
        if pool.held < needed and now >= self._launch_after:
            capacity = self._fleet.capacity()
            while pool.held < (needed if capacity is None else min(needed, capacity)):
                pool.launch()
        if pool.held > wanted:
            pool.release(pool.held - wanted)
        if pool.held > at_once:
            pool.release_idle(_IDLE_SECONDS)
        self._say_shortage(needed)

    def _writers_share(self) -> int | None:
        """How many groups leave a CPU for the commit that runs; None: any number, as long as it is not starved."""
        if self._commits.running_for() < _STARVED_SECONDS:
            self._most_groups = None
        elif self._most_groups is None and self._pool.ready and self._clock() >= self._look_again:
            self._look_again = self._clock() + _STARVED_SECONDS
            if not self._fleet.can_write():
                self._most_groups = self._pool.ready - 1
                self._display.say("no CPU is free to write results: one group is given back until they are written")
        return self._most_groups

    def _say_shortage(self, needed: int) -> None:
        """Waiting for resources has no end, but it is said."""
        now, waiting = self._clock(), self._pool.waiting
        if not waiting and (self._pool.held or not needed):
            self._say_shortage_at = now + _SHORTAGE_SECONDS[0]
        elif now >= self._say_shortage_at:
            self._say_shortage_at = now + _SHORTAGE_SECONDS[1]
            self._display.say(f"waiting for resources: {self._fleet.wants(waiting or needed)}")

    def _lose(self, group: Group, question: Question, reason: str, stage: _Stage) -> None:
        node = group.node
        self._losses += 1
        group.kill()
        fates: list[Fate] = []
        for task, _ in question.attempts:
            given_up = stage.ledger.fail(task.id, reason, group_lost=True)
            fates.append("given up" if given_up else "suspect" if stage.ledger.is_suspect(task.id) else "again")
        loss = Loss(question, group.name, node, reason, self._policy.max_attempts, tuple(fates))
        self._write_down(loss)
        self._display.say(loss.paragraph())
        for attempt, fate in zip(question.attempts, fates, strict=True):
            if fate == "given up":
                self._quarantine(attempt, reason, stage)
        if "given up" not in fates:
            self._count_loss(f"{group.name} was lost: {reason}")

    def _write_down(self, loss: Loss) -> None:
        for record in loss.records():
            self._folder.append("losses.jsonl", record)

    def _count_loss(self, what: str) -> None:
        self._losses_in_a_row += 1
        self._launch_after = self._clock() + self._policy.relaunch_seconds * self._losses_in_a_row
        if self._losses_in_a_row > 2 * max(1, self._pool.most) * self._policy.max_attempts:
            count = f"{self._losses_in_a_row} losses in a row with no task finished in between"
            raise RunError(f"{count}; the last: {what}")

    # Tasks -----------------------------------------------------------------------------------------------------------

    def _hand_out(self, stage: _Stage) -> None:
        while self._pool.idle and (attempts := self._take(stage)):
            stage.meter.begin(self._clock())
            self._pool.submit(attempts)

    def _end_late_groups(self, stage: _Stage) -> None:
        if self._clock() < self._look_for_late_at:
            return
        self._look_for_late_at = self._clock() + _LATE_SECONDS
        for group, question in self._pool.overdue(self._limit):
            self._lose(group, question, f"no answer within {_time(self._limit(question))}", stage)

    def _limit(self, question: Question) -> float:
        """Seconds within which it must be answered."""
        return self._policy.load_seconds if question.kind == "load" else self._policy.hang_seconds

    def _take(self, stage: _Stage) -> list[Attempt]:
        """What one idle group is to do next: its share of what waits, so that no other idle group goes without."""
        share = math.ceil(stage.ledger.waiting / self._pool.idle)
        taken: list[Attempt] = []
        while len(taken) < min(share, self._fleet.side_by_side) and (attempt := stage.ledger.take()):
            taken.append(attempt)
        return taken

    def _settle(self, group: Group, question: Question, stage: _Stage) -> None:
        """Take the answer a group gave, whatever it is."""
        try:
            answer = group.answer()
        except GroupLostError as error:
            self._lose(group, question, str(error), stage)
        except GroupUnreachableError as error:
            for task, _ in reversed(question.attempts):
                stage.ledger.put_back(task.id)
            self._display.say(f"{group.name} could not be reached and is asked again: {error}")
            self._count_loss(f"{group.name} could not be reached: {error}")
            (self._pool.load if question.kind == "load" else self._pool.ping)(group)
        except TaskError as error:
            self._write_down(Loss(question, group.name, group.node, str(error), self._policy.max_attempts))
            group.kill()
            raise RunError(f"a group could not be made ready: {last_line(str(error))}") from None
        else:
            self._go_on(group, question, answer, stage)

    def _go_on(self, group: Group, question: Question, answer: Any, stage: _Stage) -> None:
        if question.kind == "place":
            self._pool.load(group)
            return
        recycle = False
        if question.attempts:
            now = self._clock()
            for attempt, found in zip(question.attempts, answer, strict=True):
                if isinstance(found, TaskError):
                    recycle |= found.recycle
                    self._fail(attempt, str(found), stage)
                else:
                    self._losses_in_a_row = 0
                    stage.ledger.answer(attempt.task.id)
                    self._commits.add(found)
            if not all(isinstance(found, TaskError) for found in answer):
                stage.meter.answered(now, now - question.since)
        if recycle:
            group.kill()
        else:
            self._pool.rest(group)

    def _fail(self, attempt: Attempt, error: str, stage: _Stage) -> None:
        """The task itself raised."""
        id_, most = attempt.task.id, self._policy.max_attempts
        if stage.ledger.fail(id_, error, group_lost=False):
            self._display.say(f"{id_} is quarantined after {most} attempts: {last_line(error)}")
            self._quarantine(attempt, error, stage)
            return
        which = f"attempt {attempt.number} of {most}"
        self._display.say(f"{id_} raised an error ({which}) and runs again: {last_line(error)}")

    def _quarantine(self, attempt: Attempt, error: str, stage: _Stage) -> None:
        self._losses_in_a_row = 0  # it was the task
        id_, attempts, ledger = attempt.task.id, self._policy.max_attempts, stage.ledger
        record = {"task": id_, "time": time.time(), "attempts": attempts, "error": error}
        self._folder.append("quarantine.jsonl", record)
        if len(ledger.quarantined) >= self._policy.hopeless and not ledger.finished:
            raise RunError(f"the first {len(ledger.quarantined)} tasks all failed; the last: {last_line(error)}")

    # Commits ---------------------------------------------------------------------------------------------------------

    def _commit(self, stage: _Stage, *, wait: bool = False) -> None:
        """Settle a commit that is through and begin the next one where it is due."""
        try:
            stage.ledger.commit(self._commits.finished(wait=wait))
        except ResultsLostError as error:
            stage.ledger.forget(error.tasks)
            self._display.say(f"{error}; they run again, and what is committed stays")
            self._count_loss(str(error))
        self._commits.begin(at_once=wait or not stage.ledger.unfinished)

    def _end(self, stage: _Stage) -> None:
        """What has an answer now is committed; results that are lost on the way are simply run again next time."""
        self._display.say("stopping: what is finished is being committed")
        self._pool.close()  # groups would compete with the commit; their answers outlive them
        self._commit(stage, wait=True)
        self._commit(stage, wait=True)
        self._report(stage, always=True)
        raise Stopped

    # Telling ---------------------------------------------------------------------------------------------------------

    def _report(self, stage: _Stage, *, always: bool = False) -> None:
        now = self._clock()
        if not always and now - self._shown < _SHOW_SECONDS:
            return
        self._shown, pool = now, self._pool
        status = Status(
            stage=stage.name,
            **stage.meter.figures(pool.ready),
            groups_ready=pool.ready,
            groups_starting=pool.loading,
            groups_waiting=pool.waiting,
            losses=self._losses,
        )
        self._display.show(status)
        self._record(status)
        if always or now - self._progress_written >= _PROGRESS_SECONDS:
            self._progress_written = now
            self._folder.append("progress.jsonl", {"time": time.time(), **status.record()})


def _time(seconds: float) -> str:
    return f"{seconds:g} seconds" if seconds < 120 else f"{seconds / 60:g} minutes"
