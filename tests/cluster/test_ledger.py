from __future__ import annotations

from cluster.driver.ledger import Ledger
from cluster.tasks import Task


def make_ledger(*flops: float, done: tuple[str, ...] = (), max_attempts: int = 3) -> Ledger:
    tasks = [Task(id=f"t{i}", kind="measure", flops=cost) for i, cost in enumerate(flops)]
    return Ledger(tasks, set(done), max_attempts)


def take(ledger: Ledger) -> str:
    taken = ledger.take()
    assert taken is not None
    return taken[0].id


def test_the_longest_task_comes_first_and_done_ones_not_at_all() -> None:
    ledger = make_ledger(1, 5, 3, 5, done=("t2",))
    assert [take(ledger), take(ledger), take(ledger)] == ["t1", "t3", "t0"]
    assert ledger.take() is None
    assert (ledger.finished, ledger.finished_cost) == (1, 4.0)
    assert not ledger.complete


def test_a_task_is_complete_only_when_committed() -> None:
    ledger = make_ledger(1)
    ledger.answer(take(ledger))
    assert ledger.unfinished == 0
    assert not ledger.complete
    ledger.commit(["t0"])
    assert ledger.complete


def test_errors_are_tried_again_up_to_the_limit_and_attempts_are_counted() -> None:
    ledger = make_ledger(1, max_attempts=3)
    attempts = []
    for _ in range(3):
        taken = ledger.take()
        assert taken is not None
        attempts.append(taken[1])
        quarantined = ledger.fail("t0", "broken", group_lost=False)
    assert attempts == [1, 2, 3]
    assert quarantined
    assert ledger.quarantined == {"t0": "broken"}
    assert ledger.complete


def test_after_its_second_loss_a_task_runs_last_and_alone() -> None:
    ledger = make_ledger(9, 2, 1)
    for expected in ("t0", "t1", "t2"):
        assert take(ledger) == expected
    ledger.fail("t0", "lost", group_lost=True)
    assert take(ledger) == "t0"  # once may be bad luck
    ledger.fail("t0", "lost", group_lost=True)
    ledger.fail("t2", "raised", group_lost=False)
    assert take(ledger) == "t2"
    ledger.answer("t2")
    assert ledger.take() is None  # t1 still runs
    ledger.answer("t1")
    assert take(ledger) == "t0"
    assert ledger.take() is None


def test_interruptions_without_guilt_count_no_attempt() -> None:
    ledger = make_ledger(2, 1)
    take(ledger)
    ledger.put_back("t0")
    taken = ledger.take()
    assert taken is not None
    assert (taken[0].id, taken[1]) == ("t0", 1)
    ledger.answer("t0")
    ledger.forget(["t0"])  # its result was lost
    assert (ledger.finished, ledger.finished_cost, ledger.unfinished_cost) == (0, 0.0, 5.0)
    assert [take(ledger), take(ledger)] == ["t1", "t0"]


def test_a_suspect_that_was_interrupted_stays_a_suspect() -> None:
    ledger = make_ledger(9, 1)
    assert [take(ledger), take(ledger)] == ["t0", "t1"]
    ledger.fail("t0", "lost", group_lost=True)
    assert take(ledger) == "t0"
    ledger.fail("t0", "lost", group_lost=True)
    assert ledger.at_once == 1
    ledger.answer("t1")
    assert take(ledger) == "t0"
    ledger.put_back("t0")
    assert (ledger.at_once, ledger.waiting, ledger.is_suspect("t0")) == (1, 1, True)
    assert take(ledger) == "t0"


def test_counts_and_costs_follow_every_move() -> None:
    ledger = make_ledger(9, 4, 2, 1, done=("t3",), max_attempts=1)
    assert (ledger.waiting, ledger.running, ledger.answered, ledger.committed) == (3, 0, 0, 1)
    assert (ledger.cost, ledger.finished_cost, ledger.unfinished_cost) == (20.0, 2.0, 18.0)
    for _ in range(3):
        take(ledger)
    ledger.answer("t0")
    ledger.fail("t1", "broken", group_lost=False)
    assert (ledger.waiting, ledger.running, ledger.answered, ledger.committed) == (0, 1, 1, 1)
    assert ledger.unfinished_cost == 3.0
    ledger.answer("t2")
    ledger.commit(["t0", "t2"])
    assert (ledger.finished, ledger.unfinished_cost, ledger.complete) == (3, 0.0, True)
