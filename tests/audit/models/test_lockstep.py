"""The lock-step of ranks with tasks of their own, on threads that stand for ranks: made-up tasks, errors, no memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from audit.models.shards.errors import ShardError
from audit.models.shards.lockstep import IDLE, Lockstep, chosen

LAYERS = 6
SECONDS = 20.0  # a rank that waits longer waits for ever


class Group:
    """Ranks that exchange what they want at a barrier, and check that all fetch the same layer at the same time."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.wanted = [IDLE] * ranks
        self.fetching = [IDLE] * ranks
        self.fetched: list[int] = []
        self.barrier = threading.Barrier(ranks)

    def lockstep(self, rank: int, held: set[int], prepare: Callable[[], None] = lambda: None) -> Lockstep:
        def exchange(layer: int) -> list[int]:
            self.wanted[rank] = layer
            self.barrier.wait(SECONDS)
            answers = list(self.wanted)
            self.barrier.wait(SECONDS)
            return answers

        def fetch(layer: int) -> None:
            self.fetching[rank] = layer
            self.barrier.wait(SECONDS)
            assert self.fetching == [layer] * self.ranks, "the ranks fetch different layers"
            assert not held, "a layer is held while another one is fetched"
            held.add(layer)
            if rank == 0:
                self.fetched.append(layer)
            self.barrier.wait(SECONDS)

        return Lockstep(exchange, fetch, held.remove, prepare)

    def run(self, task: Callable[[int], Any]) -> list[Any]:
        """What ``task(rank)`` gave or raised on every rank."""
        answers: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            try:
                answers[rank] = task(rank)
            except Exception as error:
                answers[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SECONDS)
        return answers


def made_up_task(rng: random.Random) -> list[int]:
    """Layers in the order in which some sweeps ask for them: whole, broken off, down again, or in no order at all."""
    kinds = (
        lambda: list(range(LAYERS)),
        lambda: list(range(rng.randrange(LAYERS))),
        lambda: [*range(LAYERS), *reversed(range(LAYERS))],
        lambda: [rng.randrange(LAYERS) for _ in range(5)],
    )
    return [layer for _ in range(rng.randrange(4)) for layer in rng.choice(kinds)()]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_visit_of_every_task_is_served_and_all_end(ranks: int) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        tasks = [[made_up_task(rng) for _ in range(3)] for _ in range(ranks)]  # three tasks one after another
        fails = [rng.random() < 0.2 for _ in range(ranks)]
        group = Group(ranks)

        def work(rank: int, tasks: Any = tasks, fails: Any = fails, group: Group = group) -> list[int]:
            held: set[int] = set()
            lockstep = group.lockstep(rank, held)
            served: list[int] = []
            for task in tasks[rank]:
                try:
                    with lockstep.task():
                        for layer in task:
                            with lockstep.visit(layer), lockstep.visit(layer):
                                assert held == {layer}
                                served.append(layer)
                            assert not held
                        if fails[rank]:
                            raise KeyError("this task went wrong")
                except KeyError:
                    assert fails[rank]
            return served

        assert group.run(work) == [[layer for task in tasks[rank] for layer in task] for rank in range(ranks)]


def test_ranks_in_step_fetch_every_layer_once() -> None:
    group = Group(4)

    def work(rank: int) -> None:
        lockstep = group.lockstep(rank, set())
        with lockstep.task():
            for layer in range(LAYERS if rank else 2):  # one has less to do
                with lockstep.visit(layer):
                    pass

    group.run(work)
    assert group.fetched == list(range(LAYERS))


def test_what_most_ranks_want_comes_first() -> None:
    assert chosen([3, 1, 3, IDLE]) == 3
    assert chosen([1, 4, IDLE]) == 4
    assert chosen([IDLE, IDLE]) is None


def test_a_rank_that_runs_out_of_memory_before_it_asks_may_ask_again() -> None:
    group, short = Group(2), [False, True]

    def work(rank: int) -> list[str]:
        def prepare() -> None:
            if rank == 1 and short[1]:
                short[1] = False
                raise MemoryError

        lockstep, seen = group.lockstep(rank, set(), prepare), []
        with lockstep.task():
            for _ in range(2):
                try:
                    with lockstep.visit(0):
                        seen.append("visit")
                except MemoryError:
                    seen.append("none")
        return seen

    assert group.run(work) == [["visit", "visit"], ["none", "visit"]]


def test_a_rank_without_memory_to_serve_the_others_tells_them() -> None:
    group = Group(3)

    def work(rank: int) -> None:
        def prepare() -> None:
            if rank == 2:
                raise MemoryError("none left")

        lockstep = group.lockstep(rank, set(), prepare)
        with lockstep.task():
            if rank != 2:
                with lockstep.visit(0):
                    pass

    first, second, third = group.run(work)
    assert isinstance(third, MemoryError)
    for told in (first, second):
        assert isinstance(told, ShardError)
        assert "rank 2 has no memory left" in str(told)


def test_after_a_fetch_that_failed_nothing_more_is_fetched() -> None:
    asked: list[int] = []

    def fetch(layer: int) -> None:
        asked.append(layer)
        raise RuntimeError("connection closed by peer")

    lockstep = Lockstep(lambda layer: [layer], fetch, lambda layer: None, lambda: None)
    expected = r"layer 0 could not be fetched \(RuntimeError: connection closed by peer\)"
    with pytest.raises(ShardError, match=expected), lockstep.task(), lockstep.visit(0):
        pass
    with pytest.raises(ShardError, match="started again"), lockstep.visit(1):
        pass
    assert asked == [0]


def test_a_visit_within_the_visit_of_another_layer_is_a_mistake() -> None:
    lockstep = Lockstep(lambda layer: [layer], lambda layer: None, lambda layer: None, lambda: None)
    with lockstep.visit(2), pytest.raises(AssertionError, match="within the visit of layer 2"), lockstep.visit(1):
        pass
