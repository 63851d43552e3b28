"""Seeded hashes of tokens: choices that depend on the token alone, not on the batch, the worker or the order."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers, which wrap on overflow
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def splitmix(x: Tensor) -> Tensor:
    """The splitmix64 step of int64 values (Steele, Lea and Flood 2014): a bijection of the 2^64 integers."""
    x = x + _GOLDEN  # a tensor of its own, so that the rest need make no others
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def hash_words(*words: Tensor | int) -> Tensor:
    """One int64 for a tuple of integers, elementwise; tuples that differ in just one place never have the same hash."""
    tensors = [word if isinstance(word, Tensor) else torch.tensor(word, dtype=torch.int64) for word in words]
    device = next((tensor.device for tensor in tensors if tensor.ndim), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        state = splitmix(state ^ tensor.to(device))
    return state


def token_key(sequence: Tensor, position: Tensor) -> Tensor:
    """One int64 per token; sequence numbers and positions are below 2^31."""
    return (sequence.long() << 32) | position.long()


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # logical: the sign bit does not spread
