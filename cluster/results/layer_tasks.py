"""Work on one layer's effects as Ray tasks: each says how much memory it may take, and no node is given more than that.

Ray starts a task where that much memory is free of other tasks; one that no node could ever hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from cluster.driver.driver import RunError

Ref = Any
MIB = 1 << 20
# An idle worker of Ray that has imported what reads tables. Measured, as the figures per row of whoever starts tasks.
WORKER_BYTES = 384 * MIB


def start(what: str, function: Callable[..., Any], *arguments: Any, memory: int) -> Ref:
    """The answer to be, of ``function`` in a process of its own; raises RunError where no node holds ``memory`` bytes.

    ``what`` names the task for whoever looks at it, or reads why it was refused.
    """
    return _task(what, function, memory).remote(*arguments)


def start_many(what: str, function: Callable[..., Any], *arguments: Any, memory: int) -> Any:
    """As :func:`start`, of a function that yields: an iterator of the answers to be, which stay where they are."""
    return _task(what, function, memory, num_returns="streaming").remote(*arguments)


def results(refs: Sequence[Ref]) -> list[Any]:
    """The answers; raises RunError where a task was ended for memory and Ray gave up trying."""
    try:
        return list(ray.get(list(refs)))
    except ray.exceptions.OutOfMemoryError as error:
        raise RunError(f"results: a task was ended because its node ran out of memory: {error}") from error


def _task(what: str, function: Callable[..., Any], memory: int, **options: Any) -> Any:
    _require(what, memory)
    return ray.remote(function).options(name=what, num_cpus=1, memory=memory, **options)


def _require(what: str, memory: int) -> None:
    largest = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    if memory > largest:
        raise RunError(
            f"results: {what} needs {memory / MIB:,.0f} MiB of memory in one process, the largest node has "
            f"{largest / MIB:,.0f}; everything measured is committed: run `moe-audit reduce` where there is more"
        )
