"""How one process holds its model. The engine asks for a layer before it uses it, wherever that comes from.

Everything outside the decoder layers (embedding, final norm, head, rotary tables) is on every rank at all times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

from torch import nn

from audit.models.memory import Backend


class Traits(NamedTuple):
    """What a driver must know of a back end without loading its library.

    ``divided``: every rank holds a part of the layers. ``own_tasks``: each rank carries a task of its own; else every
    rank runs the same one. ``resident``: the weights of all layers are at hand at all times, so that a gradient may
    pass through several of them.
    """

    divided: bool = False
    own_tasks: bool = False
    resident: bool = True


TRAITS: dict[Backend, Traits] = {
    "single": Traits(),
    "accelerate": Traits(resident=False),
    "deepspeed_zero3": Traits(divided=True, own_tasks=True, resident=False),
    "deepspeed_tp": Traits(divided=True),
    "transformers_tp": Traits(divided=True),
}


# Looks at a model that was just read: the module, its decoder layers, how they are held.
Inspect = Callable[[nn.Module, nn.ModuleList, "ModelShard"], None]


class ModelShard:
    """A model that is whole on one device: back end ``single``. The other back ends override what they do otherwise."""

    backend: ClassVar[Backend] = "single"

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self.gathers: dict[int, int] = {}  # layer: how often its weights were fetched from elsewhere

    @property
    def traits(self) -> Traits:
        return TRAITS[self.backend]

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
