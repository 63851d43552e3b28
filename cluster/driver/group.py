"""What the driver needs of a group: to place it, load it, hand it tasks, take its answers, and end it.

A group is one logical model, held by one process or by several *ranks* together. The driver sees no Ray; whoever
implements a :class:`Fleet` sorts every failure into one of the three classes below, and the driver decides what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.tasks import Attempt

Handle = Any  # of a table that stays where it was made


class TaskError(Exception):
    """The task's own code raised. The group lives; ``recycle`` says that it should not be trusted with more work."""

    def __init__(self, text: str, *, recycle: bool = False) -> None:
        super().__init__(text)
        self.recycle = recycle


class GroupLostError(Exception):
    """A process of the group, its node or the way to it is gone, or it was killed for memory; in plain words."""


class GroupUnreachableError(Exception):
    """One message did not get through; the group may be well and must be asked again before it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a group is made of: its ranks, and the CPUs and GPUs of each.

    ``own_tasks``: each rank runs a task of its own, so that a group takes several; else all run the same one.
    """

    ranks: int = 1
    cpus: int = 1
    gpus: float = 0
    own_tasks: bool = False

    @property
    def side_by_side(self) -> int:
        """Tasks that a group runs at one time."""
        return self.ranks if self.own_tasks else 1

    def __str__(self) -> str:
        each = f"{self.cpus:g} {'CPU' if self.cpus == 1 else 'CPUs'}"
        each += f" and {self.gpus:g} {'GPU' if self.gpus == 1 else 'GPUs'}" if self.gpus else ""
        return each if self.ranks == 1 else f"{self.ranks} ranks of {each}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands in its group. ``address``: host:port at which the ranks met, "" in a group of one."""

    rank: int = 0
    ranks: int = 1
    address: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a task: a small receipt, and tables that stay where they are until they are committed.

    ``receipt``: "rows" {table: rows}, "bytes", "folder" (of observations, relative to the run folder; or absent), and
    what the engine reports.
    """

    task: str
    receipt: Mapping[str, Any]
    tables: Mapping[str, Handle]


class Group(Protocol):
    """One logical model. It is asked one thing at a time, and :meth:`Fleet.wait` tells when there is an answer."""

    name: str

    @property
    def node(self) -> str:
        """The address of the node its first rank runs on; "" until it is placed."""

    def load(self) -> None:
        """Ask it to load the model; it was placed before. The answer has no meaning, an error is told by it."""

    def ping(self) -> None:
        """Ask whether it still answers; the answer has no meaning."""

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Ask it to run tasks side by side, as many as it can; the answer is a :class:`Result` or a
        :class:`TaskError` of each.
        """

    def answer(self) -> Any:
        """What the last question was answered by; raises one of the three errors above, of tasks only the last two."""

    def kill(self) -> None:
        """End it at once, also if it hangs, and give back what it held; nothing is heard of it afterwards."""


class Fleet(Protocol):
    """Where groups come from."""

    @property
    def side_by_side(self) -> int:
        """Tasks that one group runs at one time."""

    def launch(self, name: str) -> Group:
        """Ask for a group. Its first answer, without meaning, comes when its processes have the resources they need."""

    def wait(self, seconds: float) -> Collection[Group]:
        """The groups that have an answer and were not told of before, after at most ``seconds``."""

    def capacity(self) -> int | None:
        """How many groups may be held, so that a CPU stays free for those who write results; None: no limit is known,
        and asking for more makes the cluster grow.
        """

    def can_write(self) -> bool:
        """Whether a CPU is free for those who write results."""

    def wants(self, groups: int) -> str:
        """What so many groups that wait for resources need, and what there is: the end of a sentence."""
