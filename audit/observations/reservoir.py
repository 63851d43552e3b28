"""A uniform sample of every expert's outputs that depends on the tokens alone: the outputs of smallest seeded hash.

Shapes: C candidates, S slots of an expert's reservoir, N tokens, K active experts, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audit.observations.hashing import hash_words, token_key

SIZE = 256  # outputs kept of an expert
_EMPTY = torch.iinfo(torch.int64).max  # priority of a slot that holds nothing


@dataclass(slots=True)
class LayerReservoir:
    """``priority_ES``: int64, small is kept, ``_EMPTY`` in free slots. ``output_ESD``: in the dtype of the outputs."""

    priority_ES: Tensor
    output_ESD: Tensor

    @property
    def count_E(self) -> Tensor:
        """Outputs held of each expert."""
        return (self.priority_ES != _EMPTY).sum(1)

    @property
    def order_ES(self) -> Tensor:
        """Slots by ascending priority, so that what is read does not depend on the order of arrival; free ones last."""
        return self.priority_ES.argsort(dim=1)

    def offer(self, expert_C: Tensor, priority_C: Tensor, output_CD: Tensor) -> None:
        """Keep of the stored and the offered outputs of each expert those of smallest priority, in place."""
        (experts, slots), device = self.priority_ES.shape, self.priority_ES.device
        largest_E = self.priority_ES.amax(1)
        hopeful_C = (priority_C < largest_E[expert_C]).nonzero()[:, 0]
        expert_C, priority_C = expert_C[hopeful_C], priority_C[hopeful_C]
        stored = self.priority_ES.numel()
        owner = torch.cat([torch.arange(experts, device=device).repeat_interleave(slots), expert_C])
        priority = torch.cat([self.priority_ES.flatten(), priority_C])
        order = priority.argsort()
        order = order[owner[order].argsort(stable=True)]
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = _rank_in_run(owner[order], experts) < slots

        accepted = kept[stored:].nonzero()[:, 0]
        accepted = accepted[expert_C[accepted].argsort(stable=True)]
        free = (~kept[:stored] | (priority[:stored] == _EMPTY)).nonzero()[:, 0]
        needed_E = torch.bincount(expert_C[accepted], minlength=experts)
        slot = free[_rank_in_run(free // slots, experts) < needed_E[free // slots]]
        self.priority_ES.view(-1)[slot] = priority_C[accepted]
        self.output_ESD.view(stored, -1)[slot] = output_CD[hopeful_C[accepted]]


class Reservoir:
    """``size`` outputs per (layer, expert), drawn uniformly without replacement from all tokens offered.

    Kept are those with the smallest hash of (seed, layer, expert, sequence, position): the same set, stored in the
    same order, from any chunking, order of tokens or number of workers. Bytes: L E size (D x bytes per value + 8); 16
    layers of 64 experts of hidden size 2,048, size 256: 2.1 GB in float32, 1.1 GB in bfloat16. The values have the
    dtype and device of the outputs.
    """

    def __init__(self, experts: int, size: int = SIZE, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"reservoir.size: {size} outputs cannot be drawn from; at least 1 is needed")
        self.experts, self.size, self.seed = experts, size, seed
        self.layers: dict[int, LayerReservoir] = {}

    def add(self, layer: int, *, index_NK: Tensor, output_NKD: Tensor, sequence_N: Tensor, position_N: Tensor) -> None:
        """Offer the outputs of a chunk. (sequence, position) identifies a token; no token may be offered twice."""
        held = self._layer(layer, output_NKD)
        expert_R = index_NK.flatten()
        seed_E = hash_words(self.seed, layer, torch.arange(self.experts, device=expert_R.device))
        key_R = token_key(sequence_N, position_N).repeat_interleave(index_NK.shape[1])
        held.offer(expert_R, hash_words(key_R, seed_E[expert_R]), output_NKD.reshape(len(expert_R), -1))

    @classmethod
    def merge(cls, parts: Sequence[Reservoir]) -> Reservoir:
        """The reservoir of the tokens of all parts, in host memory. ValueError where size, seed or experts differ."""
        if not parts:
            raise ValueError("reservoir: there is nothing to merge; at least one part is needed")
        merged = cls(parts[0].experts, parts[0].size, parts[0].seed)
        for part in parts:
            mine, other = ((x.experts, x.size, x.seed) for x in (merged, part))
            if mine != other:
                raise ValueError(
                    f"reservoir: (experts, size, seed) of the parts are {mine} and {other}; they must be equal"
                )
            for layer, held in part.to("cpu").layers.items():
                expert, slot = (held.priority_ES != _EMPTY).nonzero(as_tuple=True)
                target = merged._layer(layer, held.output_ESD)
                target.offer(expert, held.priority_ES[expert, slot], held.output_ESD[expert, slot])
        return merged

    def contents(self, layer: int) -> tuple[Tensor, Tensor]:
        """Outputs [E, S, D] by ascending priority, zeros in free slots, and how many there are [E]. A copy."""
        held = self.layers[layer]
        order_ES = held.order_ES
        return held.output_ESD[torch.arange(self.experts, device=order_ES.device)[:, None], order_ES], held.count_E

    def to(self, device: torch.device | str) -> Reservoir:
        """The same reservoir on another device (shared where it already is on it)."""
        moved = Reservoir(self.experts, self.size, self.seed)
        moved.layers = {
            layer: LayerReservoir(held.priority_ES.to(device), held.output_ESD.to(device))
            for layer, held in self.layers.items()
        }
        return moved

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(held.priority_ES.nbytes + held.output_ESD.nbytes for held in self.layers.values())

    def _layer(self, layer: int, like: Tensor) -> LayerReservoir:
        if layer not in self.layers:
            cells = (self.experts, self.size)
            self.layers[layer] = LayerReservoir(
                torch.full(cells, _EMPTY, dtype=torch.int64, device=like.device), like.new_zeros(*cells, like.shape[-1])
            )
        return self.layers[layer]


def _rank_in_run(owner: Tensor, experts: int) -> Tensor:
    """Position within its run of equal values, of sorted ``owner``."""
    sizes_E = torch.bincount(owner, minlength=experts)
    return torch.arange(len(owner), device=owner.device) - (sizes_E.cumsum(0) - sizes_E)[owner]
