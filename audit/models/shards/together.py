"""Ranks that work on one thing together, and say so before every step.

Before ranks add something up, and where a sweep or a task begins or ends, each tells all others in a few integers what
it is about to do. So a plan that one rank alone has, or another routing, is an error on every rank and not a number
that is partly right; and a rank that fails or runs out of memory keeps nobody waiting.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from audit.models.shards.errors import PeerOutOfMemoryError, ShardError, out_of_memory
from audit.models.shards.shard import ModelShard
from audit.observations.hashing import hash_words


class Step(IntEnum):
    """What a rank is about to do, or why it will not."""

    SUM = 0
    BEGIN = 1
    END = 2
    OUT_OF_MEMORY = 3
    FAILED = 4


_WORDS = {Step.SUM: "adds up", Step.BEGIN: "begins", Step.END: "has ended"}

_TOLD = "_told_to_other_ranks"  # noted on an error, which leaves one block after the other
Words = list[int]


class Together:
    """The steps of one rank. ``exchange`` gives every rank's words in order of rank, after all have come to it;
    ``add`` overwrites a tensor by its sum over the ranks.

    Every rank makes the same calls in the same order until one raises. Then all raise: ShardError where ranks
    did different things or another one failed, PeerOutOfMemoryError where another one had no memory left.
    """

    def __init__(self, rank: int, exchange: Callable[[Words], Sequence[Words]], add: Callable[[Tensor], None]) -> None:
        self.rank = rank
        self._exchange, self._add = exchange, add
        self._names: dict[int, str] = {}

    def sum(self, x: Tensor, name: str, checksum: int = 0) -> Tensor:
        """The sum of ``x`` over the ranks, on each of them; a gradient passes unchanged.

        ``name`` says what is added up, ``checksum`` what it was made from, such as the routing; both must be the same
        on all ranks. Without gradients ``x`` may be overwritten.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            summed: Tensor = _Sum.apply(x, self, name, checksum)  # type: ignore[no-untyped-call]
            return summed
        return self._sum(x, name, checksum)

    def enter(self, x: Tensor, name: str) -> Tensor:
        """``x``, which every rank has; each finds its part of the gradient, and they add up."""
        if torch.is_grad_enabled() and x.requires_grad:
            entered: Tensor = _Enter.apply(x, self, name)  # type: ignore[no-untyped-call]
            return entered
        return x

    @contextmanager
    def task(self) -> Iterator[None]:
        """Around one task: an error of one rank is an error of all."""
        with self._telling():
            self._meet(Step.BEGIN, "a task")
            yield
            self._meet(Step.END, "a task")

    @contextmanager
    def sweep(self, plan: Callable[[], bytes]) -> Iterator[None]:
        """Around one sweep of the same plan; out of memory on one rank is PeerOutOfMemoryError on the others."""
        with self._telling():
            self._meet(Step.BEGIN, "a sweep", hash_of(plan()))
            try:
                yield
            except Exception as error:
                if not out_of_memory(error) or isinstance(error, PeerOutOfMemoryError):
                    raise
                self._meet(Step.OUT_OF_MEMORY, "a sweep")
                raise
            self._meet(Step.END, "a sweep")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the others of an error that they do not know of; of blocks within blocks the innermost does."""
        try:
            yield
        except ShardError:  # all ranks have it
            raise
        except Exception as error:
            if not getattr(error, _TOLD, False):
                setattr(error, _TOLD, True)
                self._meet(Step.FAILED, "")
            raise

    def _sum(self, x: Tensor, name: str, checksum: int) -> Tensor:
        total = x.contiguous()  # before the others wait: this may need memory
        self._meet(Step.SUM, name, hash_of(repr((tuple(x.shape), x.dtype, checksum)).encode()))
        self._add(total)
        return total

    def _meet(self, step: Step, name: str, checksum: int = 0) -> None:
        number = zlib.crc32(name.encode())
        self._names[number] = name
        try:
            said = self._exchange([int(step), number, checksum])
        except RuntimeError as error:
            raise ShardError(f"rank {self.rank} lost the others of its group ({error})") from error
        steps = [Step(words[0]) for words in said]
        if step == Step.FAILED:
            return
        if Step.FAILED in steps:
            raise ShardError(f"rank {steps.index(Step.FAILED)} failed, and rank {self.rank} cannot go on without it")
        if step == Step.OUT_OF_MEMORY:
            return
        if Step.OUT_OF_MEMORY in steps:
            raise PeerOutOfMemoryError(f"rank {steps.index(Step.OUT_OF_MEMORY)} ran out of memory")
        for rank, words in enumerate(said):
            if words[:2] != [int(step), number]:
                theirs = f"{_WORDS[steps[rank]]} {self._names.get(words[1], 'something else')}"
                raise ShardError(
                    f"rank {self.rank} {_WORDS[step]} {name} while rank {rank} {theirs}; all ranks of a group must run "
                    "the same tasks"
                )
            if words[2] != checksum:
                other = "is about to sweep with another plan" if step == Step.BEGIN else "was given or routed otherwise"
                raise ShardError(f"{name}: rank {rank} {other} than rank {self.rank}; what they add up is no effect")


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, together: Together, name: str) -> Tensor:
        ctx.together, ctx.name = together, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.together._sum(gradient.clone(), f"the gradient of {ctx.name}", 0), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, together: Together, name: str, checksum: int) -> Tensor:
        return together._sum(x.clone(), name, checksum)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def hash_of(content: bytes) -> int:
    """64 bits, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def index_checksum(index_NK: Tensor) -> int:
    """An integer that changes with any expert's number, or with the slot or the row where it stands."""
    flat = index_NK.reshape(-1).long()
    return int(hash_words(torch.arange(len(flat), device=flat.device), flat).sum())


def over_processes(rank: int, ranks: int, control: dist.ProcessGroup | None) -> Together:
    """The ranks of the process group that torch has. Words go over ``control``, a group of the same ranks for tensors
    of the CPU; None where there is one rank.
    """

    def exchange(mine: Words) -> list[Words]:
        if ranks == 1:
            return [mine]
        said = [torch.empty(len(mine), dtype=torch.long) for _ in range(ranks)]
        dist.all_gather(said, torch.tensor(mine), group=control)
        return [words.tolist() for words in said]

    def add(x: Tensor) -> None:
        dist.all_reduce(x)

    return Together(rank, exchange, add)


class SharingShard(ModelShard):
    """A shard of a back end whose ranks all run the same task, step by step together."""

    def __init__(self, rank: int, ranks: int, control: dist.ProcessGroup | None) -> None:
        super().__init__(rank, ranks)
        self._together = over_processes(rank, ranks, control)

    def task(self) -> AbstractContextManager[None]:
        return self._together.task()

    def sweep(self, plan: Callable[[], bytes]) -> AbstractContextManager[None]:
        return self._together.sweep(plan)
