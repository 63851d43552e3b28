"""What goes wrong between ranks, and how it is known that memory ran out."""

from __future__ import annotations

import torch

# Of the host's allocator, of CUDA and NCCL, of CUDA's libraries.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class ShardError(Exception):
    """The ranks of a group do not do the same; what they would compute together is nobody's effect."""


class PeerOutOfMemoryError(MemoryError):
    """Another rank ran out of memory in the sweep that this one shares with it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has several for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _WORDS)
