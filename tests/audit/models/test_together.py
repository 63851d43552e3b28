"""What ranks tell each other before every step, on threads that stand for ranks: one fault, anywhere, by any rank."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from audit.models.shards.errors import PeerOutOfMemoryError, ShardError
from audit.models.shards.together import Together, Words, index_checksum

SECONDS = 20.0  # a rank that waits longer waits for ever


class Group:
    """Ranks that meet at a barrier."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.said: list[Words] = [[] for _ in range(ranks)]
        self.brought: list[torch.Tensor] = [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks)

    def rank(self, rank: int) -> Together:
        def exchange(mine: Words) -> list[Words]:
            self.said[rank] = mine
            self.barrier.wait(SECONDS)
            answers = list(self.said)
            self.barrier.wait(SECONDS)
            return answers

        def add(x: torch.Tensor) -> None:
            self.brought[rank] = x.clone()
            self.barrier.wait(SECONDS)
            x.copy_(torch.stack(self.brought).sum(0))
            self.barrier.wait(SECONDS)

        return Together(rank, exchange, add)

    def run(self, work: Callable[[Together], Any]) -> list[Any]:
        """What ``work`` gives on every rank, or the error that it raises."""
        found: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            try:
                found[rank] = work(self.rank(rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
        assert not any(isinstance(answer, threading.BrokenBarrierError) for answer in found)
        return found


def audit(together: Together, sweeps: int, sums: int, disturb: Callable[[int, int], bool]) -> list[float]:
    """A task of several sweeps, each tried again where memory runs out; ``disturb`` may raise before any sum,
    or say that the task ends there.
    """
    found: list[float] = []
    with together.task():
        for sweep in range(sweeps):
            while True:
                try:
                    with together.sweep(lambda sweep=sweep: b"plan %d" % sweep):  # type: ignore[misc]
                        for number in range(sums):
                            if disturb(sweep, number):
                                return found
                            x = torch.tensor([float(together.rank + number)])
                            found.append(float(together.sum(x, f"part {number}", checksum=sweep)))
                    break
                except MemoryError:
                    found = found[: sweep * sums]
    return found


@pytest.mark.parametrize("seed", range(30))
def test_a_fault_anywhere_reaches_every_rank_and_the_next_task_is_right(seed: int) -> None:
    draw = random.Random(seed)
    ranks, sweeps, sums = draw.choice([2, 3, 4]), draw.randint(1, 3), draw.randint(1, 4)
    at = (draw.randrange(ranks), draw.randrange(sweeps), draw.randrange(sums))
    fault = draw.choice(["error", "no memory", "one sum more", "another routing", "another plan", "ends early"])
    right = [sum(range(ranks)) + ranks * number for _ in range(sweeps) for number in range(sums)]

    def faulty(together: Together) -> list[float]:
        done: list[int] = []

        def disturb(sweep: int, number: int) -> bool:
            if (together.rank, sweep, number) != at or done:
                return False
            done.append(1)
            if fault == "error":
                raise ZeroDivisionError("by a rank")
            if fault == "no memory":
                raise MemoryError
            if fault == "one sum more":
                together.sum(torch.ones(1), "one more")
            if fault == "another routing":
                together.sum(torch.ones(1), f"part {number}", checksum=-1)
            if fault == "another plan":
                with together.sweep(lambda: b"mine alone"):
                    pass
            return fault == "ends early"

        return audit(together, sweeps, sums, disturb)

    group = Group(ranks)
    answers = group.run(faulty)
    if fault == "no memory":
        assert answers == [right] * ranks
    else:
        own = ZeroDivisionError if fault == "error" else ShardError
        for rank, answer in enumerate(answers):
            assert type(answer) is (own if rank == at[0] else ShardError), answer
    assert group.run(lambda together: audit(together, sweeps, sums, lambda *_: False)) == [right] * ranks


def test_what_ranks_did_is_said_in_a_sentence() -> None:
    def shorter(together: Together) -> None:
        with together.task():
            if together.rank == 1:
                with together.sweep(lambda: b"one"):
                    pass

    zero, one = Group(2).run(shorter)
    assert str(zero).startswith("rank 0 has ended a task while rank 1 begins something else")
    assert str(one).startswith("rank 1 begins a sweep while rank 0 has ended a task; all ranks of a group must run")

    def one_sided(together: Together) -> None:
        with together.sweep(lambda: b"plan %d" % together.rank):
            pass

    zero, one = Group(2).run(one_sided)
    assert str(zero) == (
        "a sweep: rank 1 is about to sweep with another plan than rank 0; what they add up is no effect"
    )


def test_out_of_memory_of_two_ranks_at_once_and_beside_an_error() -> None:
    def both(together: Together) -> None:
        with together.sweep(lambda: b""):
            if together.rank < 2:
                raise torch.OutOfMemoryError(f"rank {together.rank}")
            together.sum(torch.ones(1), "x")

    zero, one, two = Group(3).run(both)
    assert (str(zero), str(one)) == ("rank 0", "rank 1")
    assert isinstance(two, PeerOutOfMemoryError)

    def beside(together: Together) -> None:
        with together.sweep(lambda: b""):
            raise MemoryError if together.rank else ValueError("wrong")

    zero, one = Group(2).run(beside)
    assert isinstance(zero, ValueError)
    assert isinstance(one, ShardError)


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError])
def test_an_error_within_a_task_within_a_task_is_told_once_and_may_be_dealt_with_there(error: type[Exception]) -> None:
    def part(together: Together) -> float:
        with together.task():
            if together.rank == 1:
                raise error("by a rank")
            together.sum(torch.ones(1), "part")
        return 0.0

    def dealt_with(together: Together) -> float:
        with together.task():
            with contextlib.suppress(ZeroDivisionError, MemoryError, ShardError):
                part(together)
            return float(together.sum(torch.ones(1), "the rest"))

    def passed_on(together: Together) -> float:
        with together.task():
            return part(together)

    group = Group(3)
    assert group.run(dealt_with) == [3.0] * 3
    assert [type(answer) for answer in group.run(passed_on)] == [ShardError, error, ShardError]
    assert group.run(dealt_with) == [3.0] * 3


def test_gradients_of_divided_maps_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)

    def half(together: Together) -> tuple[torch.Tensor, torch.Tensor]:
        share = slice(4 * together.rank, 4 * together.rank + 4)
        mine = x.clone().requires_grad_()
        hidden = torch.tanh(together.enter(mine, "x") @ up[:, share])
        output = together.sum(hidden @ down[share], "y")
        (gradient,) = torch.autograd.grad(output.pow(2).sum(), mine)
        return output.detach(), gradient

    whole = x.clone().requires_grad_()
    output = torch.tanh(whole @ up) @ down
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), whole)
    for found in Group(2).run(half):
        torch.testing.assert_close(found[0], output.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], gradient, rtol=1e-12, atol=1e-12)


def test_a_checksum_changes_with_every_way_to_route_otherwise() -> None:
    index = torch.arange(40).reshape(20, 2) % 8
    others = [index.flip(0), index.flip(1), index.roll(2, 0)]
    for row in range(20):  # one more here, one less there, twice as much between
        changed = index.clone()
        changed[row, 0] += 1
        changed[(row + 2) % 20, 0] += 1
        changed[(row + 1) % 20, 0] -= 2
        others.append(changed)
    sums = {index_checksum(other) for other in [index, *others]}
    assert len(sums) == 1 + len(others)
    assert index_checksum(index.int()) == index_checksum(index)
