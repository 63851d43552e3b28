"""What the driver needs of a replica: to start it, ask whether it is ready, hand it a task, wait, and end it.

A replica is one logical model, however many processes hold it. The driver sees no Ray; whoever implements a
:class:`Fleet` sorts every failure into one of the three classes below, and the driver decides what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.tasks import Task

Handle = Any  # a promise of an answer; hashable


class TaskError(Exception):
    """The task's own code raised. The replica lives; ``recycle`` says that it should not be trusted with more work."""

    def __init__(self, text: str, *, recycle: bool = False) -> None:
        super().__init__(text)
        self.recycle = recycle


class ReplicaLostError(Exception):
    """The process, its node or the way to it is gone, or it was killed for memory."""


class ReplicaUnreachableError(Exception):
    """One message did not get through; the replica may be well and must be asked again before it is given up."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a task: a small receipt, and tables that stay where they are until they are committed.

    ``receipt``: "rows" {table: rows}, "bytes", "folder" (of observations, relative to the run folder; or absent), and
    what the engine reports.
    """

    task: str
    receipt: Mapping[str, Any]
    tables: Mapping[str, Handle]


class Replica(Protocol):
    """One logical model."""

    name: str

    def ping(self) -> Handle:
        """Answered once the model is loaded and nothing else runs; the answer has no meaning."""

    def submit(self, task: Task, attempt: int) -> Handle:
        """Answered by a :class:`Result`."""

    def kill(self) -> None:
        """End it at once, also if it hangs, and give back what it held."""


class Fleet(Protocol):
    """Where replicas come from."""

    size: int  # how many are wanted

    def launch(self, name: str) -> Replica:
        """Ask for a replica; it is ready when its first ping is answered."""

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        """Those of ``handles`` that have an answer, after at most ``seconds``."""

    def answer(self, handle: Handle) -> Any:
        """The answer behind a handle; raises one of the three errors above."""
