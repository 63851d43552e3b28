"""The driver against replicas of this process, with a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from audit.runfolder import RunFolder
from cluster.display import NoDisplay, Status
from cluster.driver import Driver, Policy, ResultsLostError, RunError, Stopped
from cluster.replica import Replica, ReplicaLostError, ReplicaUnreachableError, Result, TaskError
from cluster.tasks import Task

Event = Callable[[], None]


class Hang(Exception):
    """In a plan of answers: never answer."""


@dataclass(eq=False)
class FakeReplica:
    name: str
    fleet: FakeFleet
    dead: bool = False

    def ping(self) -> Any:
        return self.fleet.promise(("ping", self.name, 0), self)

    def submit(self, task: Task, attempt: int) -> Any:
        self.fleet.submitted.append((task.id, attempt, self.name))
        return self.fleet.promise((task.id, self.name, attempt), self)

    def kill(self) -> None:
        self.dead = True


@dataclass(eq=False)
class FakeFleet:
    """Answers the oldest question first. ``faults``: (task id or "ping", attempt; 0 every one) -> what is raised."""

    size: int
    faults: dict[tuple[str, int], Exception] = field(default_factory=dict)
    now: float = 0.0
    submitted: list[tuple[str, int, str]] = field(default_factory=list)
    launched: list[FakeReplica] = field(default_factory=list)
    most_running: dict[str, int] = field(default_factory=dict)
    open: dict[int, tuple[tuple[str, str, int], FakeReplica]] = field(default_factory=dict)
    count: int = 0

    def launch(self, name: str) -> Replica:
        self.launched.append(FakeReplica(name, self))
        return self.launched[-1]

    def promise(self, question: tuple[str, str, int], replica: FakeReplica) -> int:
        assert not replica.dead, "asked a replica that was killed"
        self.count += 1
        self.open[self.count] = (question, replica)
        running = sum(q[0] != "ping" for q, r in self.open.values() if not r.dead)
        self.most_running[question[0]] = max(self.most_running.get(question[0], 0), running)
        return self.count

    def _fault(self, handle: int) -> Exception | None:
        (name, _, attempt), _ = self.open[handle]
        return self.faults.get((name, attempt)) or self.faults.get((name, 0))

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        answered = [h for h in sorted(handles) if not isinstance(self._fault(h), Hang)][:1]
        self.now += 0.01 if answered else seconds
        return answered

    def answer(self, handle: Any) -> Any:
        fault = self._fault(handle)
        (name, _, attempt), replica = self.open.pop(handle)
        if fault is not None:
            if attempt == 0:
                self.faults.pop((name, 0), None)  # a ping's fault happens once
            replica.dead |= isinstance(fault, ReplicaLostError)
            raise fault
        return None if name == "ping" else Result(name, {"rows": {}, "bytes": 1}, {})


@dataclass(eq=False)
class FakeCommitter:
    commits: list[list[str]] = field(default_factory=list)
    lose_once: tuple[str, ...] = ()

    def commit(self, results: Sequence[Result]) -> None:
        if self.lose_once:
            lost, self.lose_once = self.lose_once, ()
            raise ResultsLostError(lost)
        self.commits.append([result.task for result in results])


@dataclass
class Bench:
    fleet: FakeFleet
    committer: FakeCommitter
    driver: Driver
    folder: RunFolder
    stop: list[bool]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    drivers: list[Driver] = []

    def make(size: int = 2, faults: dict[tuple[str, int], Exception] | None = None, **policy: Any) -> Bench:
        fleet, committer, stop = FakeFleet(size, faults or {}), FakeCommitter(), [False]
        folder = RunFolder(str(tmp_path))
        rules = Policy(**{"relaunch_seconds": 0.0, "commit_results": 4, **policy})
        driver = Driver(fleet, committer, folder, rules, NoDisplay(), clock=lambda: fleet.now, stop=lambda: stop[0])
        drivers.append(driver)
        return Bench(fleet, committer, driver, folder, stop)

    yield make
    for driver in drivers:
        driver.close()


def tasks(count: int) -> list[Task]:
    return [Task(id=f"t{i}", kind="measure", rows=10, flops=100.0 - i) for i in range(count)]


def committed(bench: Bench) -> list[str]:
    return sorted(id_ for commit in bench.committer.commits for id_ in commit)


def test_every_task_is_committed_once(bench: Callable[..., Bench]) -> None:
    b = bench()
    ledger = b.driver.run("effects", tasks(10), {"t3"})
    assert committed(b) == sorted(f"t{i}" for i in range(10) if i != 3)
    assert ledger.complete
    assert not ledger.quarantined
    assert max(len(commit) for commit in b.committer.commits) >= 4
    assert len(b.fleet.launched) == 2


def test_no_more_replicas_are_launched_than_there_are_tasks(bench: Callable[..., Bench]) -> None:
    b = bench(size=5)
    b.driver.run("effects", tasks(2), set())
    assert len(b.fleet.launched) == 2


def test_replicas_serve_the_next_stage(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.driver.run("calibration", tasks(3), set())
    b.driver.run("effects", [Task(id=f"e{i}", kind="measure") for i in range(3)], set())
    assert len(b.fleet.launched) == 2


def test_a_task_that_always_raises_is_quarantined_with_its_text_and_the_rest_is_done(
    bench: Callable[..., Bench],
) -> None:
    b = bench(faults={("t2", n): TaskError("Traceback ...\nRuntimeError: bad rows") for n in (1, 2, 3)})
    ledger = b.driver.run("effects", tasks(6), set())
    assert committed(b) == ["t0", "t1", "t3", "t4", "t5"]
    assert list(ledger.quarantined) == ["t2"]
    (record,) = b.folder.lines("quarantine.jsonl")
    assert (record["task"], record["attempts"]) == ("t2", 3)
    assert record["error"].endswith("RuntimeError: bad rows")
    assert len(b.fleet.launched) == 2  # an error of the task costs no replica


def test_an_error_that_spoils_the_device_costs_the_replica(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): TaskError("OutOfMemoryError", recycle=True)})
    b.driver.run("effects", tasks(2), set())
    assert committed(b) == ["t0", "t1"]
    assert [replica.dead for replica in b.fleet.launched] == [True, False]


def test_a_lost_replica_is_replaced_and_its_task_runs_again(bench: Callable[..., Bench]) -> None:
    b = bench(faults={("t1", 1): ReplicaLostError("killed")})
    b.driver.run("effects", tasks(6), set())
    assert committed(b) == [f"t{i}" for i in range(6)]
    assert [(t, a) for t, a, _ in b.fleet.submitted if t == "t1"] == [("t1", 1), ("t1", 2)]
    assert len(b.fleet.launched) == 3


def test_a_poisonous_task_runs_alone_in_the_end_and_is_quarantined(bench: Callable[..., Bench]) -> None:
    b = bench(size=3, faults={("t0", n): ReplicaLostError("killed") for n in (1, 2, 3)})
    ledger = b.driver.run("effects", tasks(8), set())
    assert list(ledger.quarantined) == ["t0"]
    assert committed(b) == [f"t{i}" for i in range(1, 8)]
    assert b.fleet.submitted[-1][:2] == ("t0", 3)


def test_a_replica_that_dies_before_it_is_ready_blames_no_task(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("ping", 0): ReplicaLostError("node died")})
    ledger = b.driver.run("effects", tasks(2), set())
    assert [attempt for _, attempt, _ in b.fleet.submitted] == [1, 1]
    assert ledger.complete
    assert len(b.fleet.launched) == 2


def test_a_message_that_did_not_get_through_costs_neither_replica_nor_attempt(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): ReplicaUnreachableError("rpc")})
    b.fleet.faults.pop(("t0", 1))
    fault = {"left": 1}
    answer = b.fleet.answer

    def flaky(handle: Any) -> Any:
        if b.fleet.open[handle][0][0] == "t0" and fault["left"]:
            fault["left"] = 0
            b.fleet.open.pop(handle)
            raise ReplicaUnreachableError("rpc")
        return answer(handle)

    b.fleet.answer = flaky  # type: ignore[method-assign]
    b.driver.run("effects", tasks(2), set())
    assert [(t, a) for t, a, _ in b.fleet.submitted] == [("t0", 1), ("t0", 1), ("t1", 1)]
    assert len(b.fleet.launched) == 1


def test_a_hanging_task_is_ended_after_the_limit(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): Hang()}, hang_seconds=50.0)
    b.driver.run("effects", tasks(2), set())
    assert committed(b) == ["t0", "t1"]
    assert b.fleet.launched[0].dead
    assert 50 < b.fleet.now < 60


def test_the_run_ends_where_replicas_only_die(bench: Callable[..., Bench]) -> None:
    b = bench(size=2, max_attempts=3)
    b.fleet.promise = lambda question, replica: -1  # type: ignore[method-assign, assignment]
    b.fleet.wait = lambda handles, seconds: list(handles)  # type: ignore[method-assign]

    def die(handle: Any) -> Any:
        raise ReplicaLostError("out of memory")

    b.fleet.answer = die  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"13 losses in a row .* a replica was lost: out of memory"):
        b.driver.run("effects", tasks(2), set())
    assert b.fleet.submitted == []


def test_a_model_that_cannot_be_loaded_ends_the_run_with_the_reason(bench: Callable[..., Bench]) -> None:
    b = bench(faults={("ping", 0): TaskError("Traceback ...\nModelError: model.source: 'x' is gone")})
    with pytest.raises(RunError, match=r"ModelError: model\.source: 'x' is gone"):
        b.driver.run("effects", tasks(2), set())
    assert "Traceback" in b.folder.lines("progress.jsonl")[-1]["error"]


def test_the_run_ends_where_every_task_fails(bench: Callable[..., Bench]) -> None:
    b = bench(faults={(f"t{i}", n): TaskError("ValueError: engine.memory") for i in range(20) for n in (1, 2, 3)})
    with pytest.raises(RunError, match=r"the first 5 tasks all failed; the last: ValueError: engine\.memory"):
        b.driver.run("effects", tasks(20), set())
    assert len(b.folder.lines("quarantine.jsonl")) == 5


def test_lost_results_are_run_again_and_the_others_committed(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.committer.lose_once = ("t1", "t2")
    b.driver.run("effects", tasks(4), set())
    assert committed(b) == ["t0", "t1", "t2", "t3"]
    assert sorted(t for t, _, _ in b.fleet.submitted) == ["t0", "t1", "t1", "t2", "t2", "t3"]


def test_a_stop_commits_what_is_finished(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, commit_results=100)
    seen: list[Status] = []

    class Watch(NoDisplay):
        def show(self, status: Status) -> None:
            seen.append(status)
            b.stop[0] = status.tasks_done == 3

    b.driver._display = Watch()
    with pytest.raises(Stopped):
        b.driver.run("effects", tasks(10), set())
    assert committed(b) == ["t0", "t1", "t2"]


def test_progress_counts_only_this_process_as_speed(bench: Callable[..., Bench]) -> None:
    b = bench(size=1)
    seen: list[Status] = []

    class Watch(NoDisplay):
        def show(self, status: Status) -> None:
            seen.append(status)

    b.driver._display = Watch()
    b.driver.run("effects", [Task(id=f"t{i}", kind="measure", rows=10, flops=99.0) for i in range(4)], {"t0", "t1"})
    assert (seen[0].tasks_done, seen[0].share, seen[0].rows_per_second) == (2, 0.5, None)
    halfway = next(status for status in seen if status.tasks_done == 3)
    assert halfway.rows == 30
    assert halfway.rows_per_second == pytest.approx(10 / 0.01)  # the ping before, another 0.01 s, does not count
    assert halfway.seconds_left == pytest.approx(0.01)
    assert b.folder.lines("progress.jsonl")[-1]["tasks_done"] == 4
