"""Run decoder layers on rows: clean tokens of several sequences side by side, and virtual tokens that stand among them.

Shapes: T clean rows of all sequences, R rows of one call, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audit.models.attention import PrefixAttention, Prefixes, UnsupportedAttention, attending, first_visible
from audit.models.seam import LayerCall, first_tensor, map_tensors, record_calls, tensors_in

# Rows whose attention scores are computed together: on a GPU a kernel should be full; on a CPU they should fit the
# cache, as far as that leaves enough rows for a product to pay.
_GPU_BLOCK = 4096
_CPU_BLOCK, _CPU_SCORES = (128, 512), 2**19


class Rows:
    """The clean rows of a batch of sequences, and what every layer is called with at each of them.

    The arguments are recorded per sequence by the model's own forward and joined along their position dimension,
    so a row at clean row i is called with exactly what the model computes for that position of that sequence.
    ``most``: rows whose attention scores may be computed together.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: nn.ModuleList,
        position_dims: list[list[int | None]],
        sequences: Sequence[Tensor],
        most: int | None = None,
    ) -> None:
        self.module, self.layers = module, layers
        self.ids = [s[None] for s in sequences]
        device = sequences[0].device
        lengths = [len(s) for s in sequences]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.start_T = torch.cat([torch.full((n,), a, device=device) for a, n in zip(starts, lengths, strict=True)])
        recorded = [record_calls(module, layers, ids) for ids in self.ids]
        self.embedded_TD = torch.cat([calls[0].hidden[0] for calls in recorded])
        self._on_gpu, self._longest, self._most = device.type == "cuda", max(lengths), most
        self._first: list[Tensor] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        masks: dict[tuple[int, ...], Tensor] = {}
        joined: dict[tuple[int, ...], Tensor] = {}
        for number in range(len(layers)):
            per_sequence = [calls[number] for calls in recorded]
            key = tuple(id(call.mask) for call in per_sequence)
            if key not in masks:
                rows = [
                    a + i
                    for a, n, call in zip(starts, lengths, per_sequence, strict=True)
                    for i in first_visible(call.mask, n)
                ]
                masks[key] = torch.tensor(rows, device=device)
            self._first.append(masks[key])
            self._calls.append(_join(per_sequence, position_dims[number], joined))
        self._dims = position_dims
        self._gathered: tuple[Tensor | None, dict[int, Tensor]] = (None, {})

    def __len__(self) -> int:
        return len(self.start_T)

    def block(self, heads: int) -> int:
        """How many rows' attention scores, of ``heads`` heads each, are computed together."""
        least, largest = _CPU_BLOCK
        on_cpu = max(least, min(largest, _CPU_SCORES // (heads * self._longest)))
        block = _GPU_BLOCK if self._on_gpu else on_cpu
        return block if self._most is None else min(block, self._most)

    def prefixes(self, layer: int, copies: int = 1) -> Prefixes:
        """Fresh storage for the keys and values of ``layer``, for ``copies`` of all clean rows one after another."""
        offsets = torch.arange(copies, device=self.start_T.device).repeat_interleave(len(self)) * len(self)
        return Prefixes(self.start_T.repeat(copies) + offsets, self._first[layer].repeat(copies) + offsets, self.block)

    def run(self, layer: int, hidden_RD: Tensor, attention: PrefixAttention, at_R: Tensor | None = None) -> Tensor:
        """The decoder layer's output [R, D] for rows that stand at the clean rows ``at_R`` (None: the
        clean rows in order).
        """
        args, kwargs = self._arguments(layer, at_R)
        with attending(attention):
            return first_tensor(self.layers[layer](hidden_RD[None], *args, **kwargs))[0]

    def _arguments(self, layer: int, at_R: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self._calls[layer]
        if at_R is None:
            return args, kwargs
        if self._gathered[0] is not at_R:
            self._gathered = (at_R, {})
        memo, dims = self._gathered[1], iter(self._dims[layer])

        def gather(tensor: Tensor) -> Tensor:
            dim = next(dims)
            if dim is None:
                return tensor
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.index_select(dim, at_R)
            return memo[id(tensor)]

        return map_tensors(args, gather), map_tensors(kwargs, gather)


def clean_forward(rows: Rows) -> tuple[Tensor, list[tuple[nn.Module, ...]]]:
    """The last layer's output [T, D] for the clean rows, and each layer's attention modules.

    Raises UnsupportedAttention where a layer mixes positions by other means.
    """
    hidden = rows.embedded_TD
    modules: list[tuple[nn.Module, ...]] = []
    for layer in range(len(rows.layers)):
        prefixes = rows.prefixes(layer)
        hidden = rows.run(layer, hidden, prefixes.rows(None))
        if not prefixes.modules:
            raise UnsupportedAttention(f"layer {layer} mixes positions by other means than attention")
        modules.append(tuple(prefixes.modules))
    return hidden, modules


def _join(
    calls: Sequence[LayerCall], dims: Sequence[int | None], joined: dict[tuple[int, ...], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The calls of all sequences as one, tensors joined along their position dimension."""
    columns = [tensors_in([c.args, c.kwargs]) for c in calls]
    number = iter(range(len(columns[0])))

    def join(tensor: Tensor) -> Tensor:
        i = next(number)
        dim = dims[i]
        if dim is None or len(calls) == 1:
            return tensor
        key = tuple(id(c[i]) for c in columns)
        if key not in joined:
            joined[key] = torch.cat([c[i] for c in columns], dim=dim)
        return joined[key]

    return map_tensors(calls[0].args, join), map_tensors(calls[0].kwargs, join)
