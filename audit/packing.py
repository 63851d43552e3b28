"""Neighbours put together until a group is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def packed(items: Iterable[T], cost: Callable[[T], float], most: float) -> Iterator[list[T]]:
    """``items`` in order, in groups that cost at most ``most`` together; what costs more is alone."""
    group: list[T] = []
    held = 0.0
    for item in items:
        if group and held + cost(item) > most:
            yield group
            group, held = [], 0.0
        group.append(item)
        held += cost(item)
    if group:
        yield group
