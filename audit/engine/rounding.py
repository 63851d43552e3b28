"""Another rounding: within a context, what the parts of a model return is moved by one unit in the last place.

Shapes: D entries of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from audit.models.moe_model import MoEModel
from audit.models.seam import replaced, with_first
from audit.observations.hashing import hash_words, splitmix

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def other_rounding(model: MoEModel, seed: int) -> Iterator[None]:
    """Within the block every attention, norm, feed-forward part and decoder layer, and the final norm, returns numbers
    moved up or down by one unit in the last place of their type.

    Where a number goes is a hash of itself: like rounding, and unlike a draw, it does not depend on the batch, and
    equal rows stay equal (this project, after stochastic arithmetic: Vignes, Math. Comput. Simul. 35, 1993).
    """
    with replaced({module: _moving(module, seed) for module in _parts(model)}):
        yield


def moved(values: Tensor, seed: int) -> Tensor:
    """``values`` [..., D], each one unit in the last place further from zero or nearer to it. Zeros, which sums of
    nothing give exactly, and what is not finite stay.
    """
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    key_D = hash_words(seed, torch.arange(values.shape[-1], device=values.device))
    up_or_down = (splitmix(bits.long() ^ key_D) >> 63).bitwise_or_(1).to(bits.dtype)  # -1 where the hash is negative
    size = values.abs()
    return torch.where((size > 0) & (size < torch.inf), up_or_down.add_(bits).view(values.dtype), values)


def _parts(model: MoEModel) -> list[nn.Module]:
    around = next(m for m in model.module.modules() if any(child is model.layers for child in m.children()))
    beside = [m for m in around.children() if m is not model.layers and not isinstance(m, nn.Embedding)]
    inside = [part for layer in model.layers for part in (layer, *layer.children())]
    return [m for m in (*inside, *beside) if any(True for _ in m.parameters())]


def _moving(module: nn.Module, seed: int) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        values = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(values, Tensor) or not values.is_floating_point():
            return output  # no hidden states
        return with_first(output, moved(values, seed))

    return forward
