"""Take over parts of a model for a while: replace a module's forward, record what layers are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, each module's forward is the given function; hooks and wrappers around it still run."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output, which some families wrap in a tuple."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, Tensor)
    return found


def with_first(output: Any, tensor: Tensor) -> Any:
    """``output`` with its hidden states exchanged for ``tensor``."""
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with the function applied to every tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside ``value``, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


class LayerCall:
    """What one decoder layer is called with besides the hidden states, for the rows of one sequence."""

    __slots__ = ("args", "hidden", "kwargs", "mask")

    def __init__(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
        self.hidden, self.args, self.kwargs, self.mask = hidden, args, kwargs, mask


# A cache has no meaning for rows that share a prefix; flags would change a layer's return value.
_DROPPED = ("past_key_values", "past_key_value", "use_cache", "cache_position", "output_attentions", "attention_mask")


@torch.inference_mode()
def record_calls(model: nn.Module, layers: nn.ModuleList, input_ids: Tensor) -> list[LayerCall]:
    """Run the model's own forward on ``input_ids`` [1, T] with idle layers; return what each layer would have
    been given.

    Embedding scaling, rotary embeddings and masks are thereby the model's own, for this very sequence length.
    """
    calls: list[LayerCall] = []

    def recorder(layer: nn.Module) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            kept = {k: v for k, v in kwargs.items() if k not in _DROPPED}
            calls.append(LayerCall(hidden_states, args, kept, mask if isinstance(mask, Tensor) else None))
            return hidden_states

        return forward

    with replaced({layer: recorder(layer) for layer in layers}):
        model(input_ids=input_ids, use_cache=False)
    return calls
