"""How one process holds its model. The engine asks for a layer before it uses it, wherever that comes from.

Everything outside the decoder layers (embedding, final norm, head, rotary tables) is on every rank at all times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn


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


# Looks at a model that was just read: the module, its decoder layers, how they are held.
Inspect = Callable[[nn.Module, nn.ModuleList, "ModelShard"], None]


class ModelShard:
    """A model that is whole on one device: back end ``single``. The other back ends override what they do otherwise.

    ``own_tasks``: each rank carries a task of its own; else every rank runs the same one. ``resident``: the weights of
    all layers are at hand at all times, so that a gradient may pass through several of them.
    """

    backend: ClassVar[str] = "single"
    own_tasks: ClassVar[bool] = False
    resident: ClassVar[bool] = True

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self.gathers: dict[int, int] = {}  # layer: how often its weights were fetched from elsewhere

    def visit(self, layer: int) -> AbstractContextManager[None]:
        """Within the block the layer's weights are on this device. Visits of one layer may be nested."""
        return nullcontext()

    def task(self) -> AbstractContextManager[None]:
        """Around one task: when one rank leaves early, or by an error, the others need not wait for it for ever."""
        return nullcontext()

    def sweep(self, plan: Callable[[], bytes]) -> AbstractContextManager[None]:
        """Around one sweep, which may be tried again in smaller parts where memory runs out.

        ``plan``: bytes that say what will be computed. Where ranks run the same sweep together, raises ShardError on
        every rank unless all have the same plan, and PeerOutOfMemoryError on those that had memory left where one
        had not.
        """
        return nullcontext()

    def notes(self) -> list[str]:
        """What the model's description says of the back end."""
        return []

    def weight_bytes(self, layers: nn.ModuleList, module: nn.Module) -> int:
        """Bytes of weights on this device while a layer is visited."""
        return sum(p.numel() * p.element_size() for p in module.parameters())
