"""What goes wrong between ranks, and how it is known that memory ran out."""

from __future__ import annotations

import torch


class ShardError(Exception):
    """The ranks of a group do not do the same; what they would compute together is nobody's effect."""


class PeerOutOfMemoryError(MemoryError):
    """Another rank ran out of memory in the sweep that this one shares with it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has several for it."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
