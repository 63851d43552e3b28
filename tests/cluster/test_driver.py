"""The driver against groups of this process, with a clock of its own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import FakeCommitter, FakeFleet, FakeGroup, Hang, TakesNoTime, Watch

from audit.runfolder import RunFolder
from cluster.display import Display, LineDisplay, NoDisplay, Status
from cluster.driver import driver as driver_module
from cluster.driver.driver import Driver, Policy, RunError, Stopped
from cluster.driver.group import GroupLostError, GroupUnreachableError, Result, TaskError
from cluster.driver.scaling import Scale
from cluster.tasks import Task


@dataclass
class Bench:
    fleet: FakeFleet
    committer: FakeCommitter
    driver: Driver
    folder: RunFolder
    stop: list[bool]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """``beside``: commits run in a thread, and the clock goes on meanwhile."""
    drivers: list[Driver] = []

    def make(
        size: int = 2,
        faults: dict[tuple[str, int], Exception] | None = None,
        scale: Scale | None = None,
        display: Display | None = None,
        beside: bool = False,
        **policy: Any,
    ) -> Bench:
        thread = ThreadPoolExecutor if beside else lambda *options: TakesNoTime()
        monkeypatch.setattr("cluster.driver.commits.ThreadPoolExecutor", thread)
        fleet, committer, stop = FakeFleet(faults or {}), FakeCommitter(), [False]
        folder = RunFolder(str(tmp_path))
        rules = Policy(**{"relaunch_seconds": 0.0, "commit_results": 4, **policy})
        driver = Driver(
            fleet,
            committer,
            folder,
            rules,
            scale or Scale(max_groups=size),
            display or NoDisplay(),
            clock=lambda: fleet.now,
            stop=lambda: stop[0],
        )
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


def test_no_more_groups_are_launched_than_there_are_tasks(bench: Callable[..., Bench]) -> None:
    b = bench(size=5)
    b.driver.run("effects", tasks(2), set())
    assert len(b.fleet.launched) == 2


def test_groups_serve_the_next_stage(bench: Callable[..., Bench]) -> None:
    b = bench()
    effects = [Task(id=f"e{i}", kind="measure") for i in range(3)]
    b.driver.run("calibration", tasks(3), set(), effects)
    assert b.fleet.alive == 2
    b.driver.run("effects", effects, set())
    assert len(b.fleet.launched) == 2
    assert b.fleet.alive == 0  # nothing waits for them any more


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
    assert len(b.fleet.launched) == 2  # an error of the task costs no group


def test_an_error_that_spoils_the_device_costs_the_group(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): TaskError("OutOfMemoryError", recycle=True)})
    b.driver.run("effects", tasks(2), set())
    assert committed(b) == ["t0", "t1"]
    assert b.fleet.launched[0].dead
    assert len(b.fleet.launched) == 2


def test_a_lost_group_is_replaced_and_its_task_runs_again(bench: Callable[..., Bench]) -> None:
    b = bench(faults={("t1", 1): GroupLostError("killed")})
    b.driver.run("effects", tasks(6), set())
    assert committed(b) == [f"t{i}" for i in range(6)]
    assert [(t, a) for t, a, _ in b.fleet.submitted if t == "t1"] == [("t1", 1), ("t1", 2)]
    assert len(b.fleet.launched) == 3


def test_a_poisonous_task_runs_alone_in_the_end_and_is_quarantined(bench: Callable[..., Bench]) -> None:
    b = bench(size=3, faults={("t0", n): GroupLostError("killed") for n in (1, 2, 3)})
    ledger = b.driver.run("effects", tasks(8), set())
    assert list(ledger.quarantined) == ["t0"]
    assert committed(b) == [f"t{i}" for i in range(1, 8)]
    assert b.fleet.submitted[-1][:2] == ("t0", 3)


def test_a_group_that_dies_before_it_is_ready_blames_no_task(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("load", 0): GroupLostError("node died")})
    ledger = b.driver.run("effects", tasks(2), set())
    assert [attempt for _, attempt, _ in b.fleet.submitted] == [1, 1]
    assert ledger.complete
    assert len(b.fleet.launched) == 2


def test_a_message_that_did_not_get_through_costs_neither_group_nor_attempt(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): GroupUnreachableError("rpc")})
    b.driver.run("effects", tasks(2), set())
    assert [(t, a) for t, a, _ in b.fleet.submitted] == [("t0", 1), ("t0", 1), ("t1", 1)]
    assert len(b.fleet.launched) == 1


def test_a_hanging_task_is_ended_after_the_limit(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t0", 1): Hang()}, hang_seconds=50.0)
    b.driver.run("effects", tasks(2), set())
    assert committed(b) == ["t0", "t1"]
    assert b.fleet.launched[0].dead
    assert 50 < b.fleet.now < 60


def test_the_run_ends_where_groups_only_die(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench(size=2, max_attempts=3)

    def die(group: FakeGroup) -> Any:
        raise GroupLostError("out of memory")

    monkeypatch.setattr(FakeGroup, "answer", die)
    with pytest.raises(RunError, match=r"13 losses in a row .* group-\d+ was lost: out of memory"):
        b.driver.run("effects", tasks(2), set())
    assert b.fleet.submitted == []


def test_a_model_that_cannot_be_loaded_ends_the_run_with_the_reason(bench: Callable[..., Bench]) -> None:
    b = bench(faults={("load", 0): TaskError("Traceback ...\nModelError: model.source: 'x' is gone")})
    with pytest.raises(RunError, match=r"ModelError: model\.source: 'x' is gone"):
        b.driver.run("effects", tasks(2), set())
    assert "Traceback" in b.folder.lines("losses.jsonl")[-1]["reason"]
    assert b.fleet.launched[0].dead


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


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(driver_module, "_SHOW_SECONDS", 0.0)
    return Watch()


def test_a_stop_commits_what_is_finished(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=1, commit_results=100, display=watch)

    def stop_at_three(status: Status) -> None:
        b.stop[0] = status.tasks_done == 3

    watch.told = stop_at_three
    with pytest.raises(Stopped):
        b.driver.run("effects", tasks(10), set())
    assert committed(b) == ["t0", "t1", "t2"]
    assert b.fleet.alive == 0


def test_progress_counts_only_this_process_as_speed(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=1, display=watch)
    b.driver.run("effects", [Task(id=f"t{i}", kind="measure", rows=10, flops=99.0) for i in range(4)], {"t0", "t1"})
    first = watch.seen[0]
    assert (first.tasks_done, first.share, first.rows_per_second) == (2, 0.5, None)
    halfway = next(status for status in watch.seen if status.tasks_done == 3)
    assert halfway.rows == 30
    assert halfway.rows_per_second == pytest.approx(10 / 0.01)  # placing and loading before do not count
    assert halfway.seconds_left == pytest.approx(0.01)
    assert halfway.group_seconds_left == pytest.approx(0.01)
    assert b.folder.lines("progress.jsonl")[-1]["tasks_done"] == 4


def test_a_status_counts_every_task_and_group_once(bench: Callable[..., Bench], watch: Watch) -> None:
    faults: dict[tuple[str, int], Exception] = {("t2", n): TaskError("bad") for n in (1, 2, 3)}
    faults |= {("load", 0): GroupLostError("gone")}
    b = bench(size=3, faults=faults, display=watch)
    b.driver.run("effects", tasks(6), {"t5"})
    for status in watch.seen:
        states = (status.waiting, status.running, status.answered, status.committed, status.quarantined)
        assert sum(states) == status.tasks == 6
        assert status.groups_ready >= status.running
        assert status.groups_ready + status.groups_starting + status.groups_waiting <= 3
    last = watch.seen[-1]
    assert (last.committed, last.quarantined, last.losses) == (5, 1, 1)
    assert max(status.groups_starting for status in watch.seen) >= 1
    assert max(status.groups_waiting for status in watch.seen) >= 1


def test_the_metrics_hear_what_the_display_shows(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(display=watch)
    recorded: list[Status] = []
    b.driver._record = recorded.append
    b.driver.run("effects", tasks(4), set())
    assert recorded == watch.seen


# Groups come and go --------------------------------------------------------------------------------------------------


def test_a_hang_counts_from_when_a_task_runs_and_not_while_resources_are_waited_for(
    bench: Callable[..., Bench], watch: Watch
) -> None:
    b = bench(size=1, faults={("place", 0): Hang()}, hang_seconds=50.0, display=watch)

    def placed_late(status: Status) -> None:
        if b.fleet.now > 1000:
            b.fleet.faults.pop(("place", 0), None)

    watch.told = placed_late
    b.driver.run("effects", tasks(2), set())
    assert len(b.fleet.launched) == 1
    waits = [line for line in watch.said if line.startswith("waiting for resources: 1 groups need")]
    assert len(waits) == 4  # after 30 seconds and then every five minutes
    assert committed(b) == ["t0", "t1"]


def test_loading_is_bounded(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=1, faults={("load", 0): Hang()}, hang_seconds=20.0, load_seconds=200.0, display=watch)

    def loads_now(status: Status) -> None:
        if status.losses == 1:
            b.fleet.faults.clear()

    watch.told = loads_now
    b.driver.run("effects", tasks(2), set())
    assert len(b.fleet.launched) == 2
    assert [attempt for _, attempt, _ in b.fleet.submitted] == [1, 1]
    assert "was lost while it loaded the model: no answer within 3.33333 minutes" in watch.said[0]


def groups_over_time(b: Bench) -> dict[float, int]:
    """Filled while the driver runs: how many groups there were, by the time of each wait."""
    alive: dict[float, int] = {}
    wait = b.fleet.wait

    def watched(seconds: float) -> list[FakeGroup]:
        alive[b.fleet.now] = b.fleet.alive
        return wait(seconds)

    b.fleet.wait = watched  # type: ignore[method-assign]
    return alive


def test_groups_that_nothing_waits_for_are_given_back_while_the_last_tasks_run(bench: Callable[..., Bench]) -> None:
    b = bench(size=4, faults={("t0", 1): Hang()}, hang_seconds=100.0)
    alive = groups_over_time(b)
    b.driver.run("effects", tasks(8), set())
    assert max(alive.values()) == 4
    assert {count for now, count in alive.items() if 1 < now < 99} == {1}  # t0 hangs; the others are done
    assert b.fleet.alive == 0
    assert committed(b) == [f"t{i}" for i in range(8)]


def test_groups_are_kept_a_minute_for_a_later_stage_and_no_longer(bench: Callable[..., Bench]) -> None:
    b = bench(size=2, faults={("t0", 1): Hang()}, hang_seconds=300.0)
    alive = groups_over_time(b)
    b.driver.run("calibration", tasks(2), set(), [Task(id="e0", kind="measure")] * 2)
    assert {count for now, count in alive.items() if 1 < now < 59} == {2}
    assert {count for now, count in alive.items() if 62 < now < 299} == {1}


def test_no_more_groups_are_held_than_the_cluster_has_room_for(bench: Callable[..., Bench]) -> None:
    b = bench(size=5)
    b.fleet.most = 2
    b.driver.run("effects", tasks(9), set())
    assert len(b.fleet.launched) == 2
    assert max(b.fleet.most_running.values()) == 2


def test_without_room_it_waits_and_says_so(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=5, display=watch)
    b.fleet.most = 0

    def more(status: Status) -> None:
        b.fleet.most = 3 if b.fleet.now > 40 else 0

    watch.told = more
    b.driver.run("effects", tasks(9), set())
    assert watch.said == ["waiting for resources: 5 groups need what there is not"]
    assert len(b.fleet.launched) == 3


def test_the_number_of_groups_follows_the_time_that_is_left(bench: Callable[..., Bench], watch: Watch) -> None:
    """Predicted: 39 tasks of 100 s each, to be done in 2000 s. Measured: 0.01 s each, so that one group is enough."""
    work = [Task(id=f"t{i:02d}", kind="measure", flops=99_999.0) for i in range(39)]
    scale = Scale(min_groups=1, max_groups=8, target_seconds=2000.0, flops_per_second=1000.0)
    b = bench(scale=scale, display=watch)
    held: dict[int, int] = {}  # by how many tasks are through

    def note(status: Status) -> None:
        held.setdefault(status.tasks_done, b.fleet.alive)

    watch.told = note
    b.driver.run("effects", work, set())
    assert held[0] == 2
    assert held[20] == 1
    assert len(b.fleet.launched) == 2
    assert committed(b) == [task.id for task in work]


def test_a_commit_that_finds_no_free_cpu_gets_that_of_a_group(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=2, faults={("t3", 1): Hang()}, hang_seconds=500.0, commit_results=2, display=watch, beside=True)
    b.fleet.writes = False
    commit = b.committer.commit

    def blocked(results: Sequence[Result]) -> None:
        while results[0].task == "t0" and b.fleet.alive == 2:
            assert b.fleet.now < 400, "no group was given back"
        commit(results)

    b.committer.commit = blocked  # type: ignore[method-assign]
    b.driver.run("effects", tasks(4), set(), [Task(id="e0", kind="measure")] * 5)
    assert watch.said[0] == "no CPU is free to write results: one group is given back until they are written"
    assert committed(b) == ["t0", "t1", "t2", "t3"]


# Telling -------------------------------------------------------------------------------------------------------------


def test_a_death_is_told_in_one_paragraph(bench: Callable[..., Bench]) -> None:
    out = io.StringIO()
    died = GroupLostError("its process was killed by the system or crashed (process 17)")
    b = bench(size=1, faults={("t0", n): died for n in (1, 2, 3)}, display=LineDisplay(out, seconds=1e9))
    b.driver.run("effects", tasks(2), set())
    lines = [line for line in out.getvalue().splitlines() if "was lost" in line]
    start = "was lost while it ran t0 (attempt {} of 3): its process was killed by the system or crashed (process 17). "
    assert lines == [
        f"group-0 on node 10.0.0.2 {start.format(1)}t0 runs again on another group. What is committed stays.",
        f"group-1 on node 10.0.0.3 {start.format(2)}t0 was running at several losses, so it runs again after all "
        "others and alone. What is committed stays.",
        f"group-2 on node 10.0.0.4 {start.format(3)}t0 is given up, quarantine.jsonl has the error, and the other "
        "tasks go on. What is committed stays.",
    ]
    assert [(r["task"], r["attempt"], r["quarantined"]) for r in b.folder.lines("losses.jsonl")] == [
        ("t0", 1, False),
        ("t0", 2, False),
        ("t0", 3, True),
    ]
    assert b.folder.lines("quarantine.jsonl")[0]["error"] == str(died)


def test_an_error_that_is_tried_again_is_told(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=1, faults={("t0", 1): TaskError("Traceback\nValueError: odd")}, display=watch)
    b.driver.run("effects", tasks(1), set())
    assert watch.said == ["t0 raised an error (attempt 1 of 3) and runs again: ValueError: odd"]


def test_a_thousand_groups_and_many_tasks_pass_through(bench: Callable[..., Bench], watch: Watch) -> None:
    b = bench(size=1000, display=watch, commit_results=1000)
    b.fleet.wait = lambda seconds: [b.fleet.open.pop(0) for _ in range(len(b.fleet.open))]  # type: ignore[method-assign]
    b.driver.run("effects", tasks(3000), set())
    assert len(committed(b)) == 3000
    assert max(b.fleet.most_running.values()) == 1000
    assert len(b.fleet.launched) == 1000


def test_a_group_whose_ranks_work_for_themselves_takes_several_tasks(bench: Callable[..., Bench]) -> None:
    b = bench(size=2)
    b.fleet.side_by_side = 3
    ledger = b.driver.run("effects", tasks(7), ())
    assert ledger.committed == 7
    assert len(b.fleet.launched) == 2  # not seven
    first = [name for task, _, name in b.fleet.submitted[:6]]
    assert sorted(first.count(name) for name in set(first)) == [3, 3]


def test_no_group_takes_several_tasks_while_another_has_none(bench: Callable[..., Bench]) -> None:
    b = bench(size=2)
    b.fleet.side_by_side = 8
    more = [Task(id=f"u{i}", kind="measure", rows=1, flops=1.0) for i in range(9)]
    b.driver.run("first", tasks(9), (), more)  # two groups are ready after it
    b.fleet.submitted.clear()
    b.driver.run("second", more, ())
    by_group = [name for _, _, name in b.fleet.submitted]
    assert sorted(by_group.count(name) for name in set(by_group)) == [4, 5]


def test_a_lost_group_blames_every_task_it_ran_and_a_suspect_runs_alone(bench: Callable[..., Bench]) -> None:
    lost = GroupLostError("its node was lost")
    b = bench(size=1, faults={("t1", 1): lost, ("t1", 2): lost, ("t1", 3): lost})
    b.fleet.side_by_side = 3
    ledger = b.driver.run("effects", tasks(6), ())
    assert list(ledger.quarantined) == ["t1"]
    assert ledger.committed == 5
    assert b.fleet.most_running["t1"] <= 3
    alone = [(task, attempt) for task, attempt, _ in b.fleet.submitted if (task, attempt) == ("t1", 3)]
    assert len(alone) == 1
    lines = b.folder.lines("losses.jsonl")
    assert {line["task"] for line in lines if line["attempt"] == 1} == {"t0", "t1", "t2"}
    assert [line["task"] for line in lines if line["attempt"] == 3] == ["t1"]
    assert lines[-1]["quarantined"]


def test_an_error_of_one_of_several_tasks_is_its_own(bench: Callable[..., Bench]) -> None:
    b = bench(size=1, faults={("t1", 1): TaskError("Traceback\nValueError: once")})
    b.fleet.side_by_side = 3
    assert b.driver.run("effects", tasks(3), ()).committed == 3
    assert [attempt for task, attempt, _ in b.fleet.submitted if task != "t1"] == [1, 1]
    assert [attempt for task, attempt, _ in b.fleet.submitted if task == "t1"] == [1, 2]
    assert len(b.fleet.launched) == 1
