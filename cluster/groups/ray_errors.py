"""Ray's errors, sorted: whose fault it was, and what happened in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping

import ray.exceptions
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from audit.storage import StorageError
from cluster.driver.group import GroupLostError, GroupUnreachableError, TaskError

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# After these the device or the process is not what it was before, though it still answers.
_RECYCLE = ("OutOfMemoryError", "AcceleratorError", "MemoryError")
# A rank whose partner went away says so in one of these words.
_COMMUNICATION = re.compile(r"gloo|nccl|c10d|process ?group|TCPStore|connection (reset|closed) by peer", re.IGNORECASE)
# What a rank says that was well itself: another one failed, or they cannot go on together.
_TOGETHER = ("ShardError", "PeerOutOfMemoryError")
# What Ray says of a process that ended, and what it means. The first that fits is told.
_MEANING = (
    ("preempted", "its node was taken back by the provider"),
    ("node has died", "its node was lost"),
    ("node was terminated", "its node was lost"),
    ("ray.kill", "it was ended from outside"),
    ("running low on memory", "its node ran out of memory, and Ray ended it"),
    ("connection error code 2", "its process was killed by the system or crashed"),
    ("INTENDED_SYSTEM_EXIT", "its process was ended by the system"),
)


def sort_own_errors(errors: Mapping[int, BaseException], ranks: int) -> dict[int, TaskError]:
    """By rank what its task raised, where every rank runs its own; raises where something is wrong with the group."""
    own = {rank: error for rank, error in errors.items() if not ends_group(error)}
    if len(own) < len(errors):  # a rank is gone, and others may say that they lost the way to it
        lost = sort_errors({rank: error for rank, error in errors.items() if rank not in own}, ranks)
        raise GroupLostError(str(lost).splitlines()[-1]) if isinstance(lost, TaskError) else lost
    found = {rank: sort_errors({rank: error}, 1) for rank, error in own.items()}
    for error in found.values():
        if not isinstance(error, TaskError):
            raise error
    return {rank: error for rank, error in found.items() if isinstance(error, TaskError)}


def sort_errors(errors: Mapping[int, BaseException], ranks: int) -> Exception:
    """What errors of a group's ranks mean for the driver: one of the three errors of :mod:`cluster.driver.group`, or
    a StorageError, which is nobody's fault and ends the run.
    """
    for error in errors.values():
        if isinstance(error, RayTaskError) and isinstance(error.cause, StorageError):
            return error.cause
    for rank, error in errors.items():
        if not isinstance(error, RayTaskError):
            if isinstance(error, ActorUnavailableError) and ranks == 1:
                return GroupUnreachableError(first_line(error))
            who = "" if ranks == 1 else f"rank {rank}: "
            return GroupLostError(f"{who}{in_plain_words(error)}")
    raised = {rank: error for rank, error in errors.items() if isinstance(error, RayTaskError)}
    own = {rank: error for rank, error in raised.items() if ranks == 1 or not _is_communication(error)}
    if not own:
        rank, error = next(iter(raised.items()))
        return GroupLostError(f"rank {rank} lost the way to the others ({_last_line(error)})")
    # The others say no more of it than that a rank failed.
    error = min(own.values(), key=lambda error: type(error.cause).__name__ in _TOGETHER)
    # Where several ranks work together the others now wait for this one, for ever.
    recycle = ranks > 1 or type(error.cause).__name__ in _RECYCLE
    return TaskError(_clean(error), recycle=recycle)


def in_plain_words(error: BaseException) -> str:
    """What happened to a process, and Ray's own words in brackets."""
    text = _clean(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return f"its node ran out of memory, and Ray ended it ({first_line(error)})"
    if isinstance(error, ray.exceptions.ObjectLostError):
        return f"its node was lost with the answer ({first_line(error)})"
    if isinstance(error, RayActorError):
        meaning = next((meaning for words, meaning in _MEANING if words in text), "it ended")
        pid = re.search(r"^\s*pid: (\d+)", text, re.MULTILINE)
        ip = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
        where = ", ".join([*(f"process {m[1]}" for m in [pid] if m), *(f"node {m[1]}" for m in [ip] if m)])
        return f"{meaning} ({where + ': ' if where else ''}{_detail(text)})"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = _clean(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    return _clean(error).splitlines()[-1]


def _detail(text: str) -> str:
    """The sentence in which Ray gives its reason, without the list of what else it might have been."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if line.startswith("The actor")), lines[0] if lines else "")
    line = next((line for line in lines if line.startswith("The actor is dead")), line)
    return re.split(r" (?:Some common causes|There are some potential)", line)[0].rstrip(".")


def ends_group(error: BaseException) -> bool:
    """Whether an error of a rank with a task of its own is the end of its group, and not that of its task alone."""
    if not isinstance(error, RayTaskError):
        return True
    return _is_communication(error) or type(error.cause).__name__ in _TOGETHER


def _is_communication(error: RayTaskError) -> bool:
    """Whether a rank raised because another one went away."""
    names = {cls.__name__ for cls in type(error.cause).__mro__}
    return "DistError" in names or (
        bool(names & {"RuntimeError", "ShardError"}) and bool(_COMMUNICATION.search(str(error.cause)))
    )


def _clean(error: BaseException) -> str:
    return _ANSI.sub("", str(error)).strip()
