"""Experts divided over the ranks of a group: each holds some experts of every layer, and what they give is added up.

Every rank is given the same rows with the same routing. Shapes: N rows, K slots, D hidden, E experts; M slots of this
rank's own experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from audit.models.experts import Experts, ModuleExperts, SortedExperts
from audit.models.shards.together import Together, index_checksum


class SlicedExperts:
    """The experts ``first`` up to ``first + count`` are here, computed by ``local``, which counts them from 0."""

    def __init__(self, local: Experts, first: int, count: int, together: Together, name: str) -> None:
        self._local, self._first, self._count = local, first, count
        self._together, self._name = together, name

    def outputs(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        x_ND = self._together.enter(x_ND, self._name)
        place_M, own_MD = self._own(x_ND, index_NK)
        # Every slot is one rank's, so this sum adds zeros and rounds nothing.
        out = x_ND.new_zeros(index_NK.numel(), x_ND.shape[-1]).index_copy(0, place_M, own_MD)
        return self._sum(out, index_NK, "outputs").view(*index_NK.shape, -1)

    def mixture(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        x_ND = self._together.enter(x_ND, self._name)
        weights_NK = self._together.enter(weights_NK, f"{self._name}, its weights")
        place_M, own_MD = self._own(x_ND, index_NK)
        return self._sum(_mixed(place_M, own_MD, weights_NK), index_NK, "mixture")

    def both(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        outputs_NKD = self.outputs(x_ND, index_NK)
        place_S = torch.arange(index_NK.numel(), device=index_NK.device)
        return outputs_NKD, _mixed(place_S, outputs_NKD.flatten(0, 1), weights_NK)

    def _own(self, x_ND: Tensor, index_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots are of this rank's experts, ascending [M], and their outputs [M, D]."""
        local = index_NK.reshape(-1) - self._first
        place_M = torch.nonzero((local >= 0) & (local < self._count)).flatten()
        rows_MD = x_ND.index_select(0, place_M.div(index_NK.shape[1], rounding_mode="floor"))
        # Also without rows the result hangs on x, so that a gradient passes here on every rank or on none.
        return place_M, self._local.outputs(rows_MD, local[place_M][:, None])[:, 0] if len(place_M) else rows_MD

    def _sum(self, x: Tensor, index_NK: Tensor, what: str) -> Tensor:
        return self._together.sum(x, f"{self._name}, {what}", index_checksum(index_NK))


def _mixed(place_M: Tensor, outputs_MD: Tensor, weights_NK: Tensor) -> Tensor:
    """The weighted sum of each row's slots among ``place_M``, in slot order [N, D]."""
    N, K = weights_NK.shape
    weights_M = weights_NK.to(outputs_MD.dtype).reshape(-1)[place_M]
    first_N = torch.searchsorted(place_M, torch.arange(0, N * K, K, device=place_M.device))
    row_M = torch.arange(len(place_M), device=place_M.device)
    if not len(place_M):  # the operator below refuses an empty table
        return outputs_MD.new_zeros(N, outputs_MD.shape[-1]) + outputs_MD.sum() + weights_M.sum()
    return F.embedding_bag(row_M, outputs_MD, first_N, mode="sum", per_sample_weights=weights_M)


class DividedExperts(nn.Module):
    """Stands where an experts module of ``num_experts`` stood, of which this rank keeps some.

    The module itself is cut and kept out of sight, so that nothing takes it for a layer's experts.
    """

    local: nn.Module

    def __init__(self, whole: nn.Module, num_experts: int, ranks: int, together: Together, name: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.bounds = [num_experts * r // ranks for r in range(ranks + 1)]
        self.together, self.name = together, name
        self.first, end = self.bounds[together.rank], self.bounds[together.rank + 1]
        self.count = end - self.first
        for key, parameter in list(whole.named_parameters(recurse=False)):
            if parameter.shape[:1] != (num_experts,):
                continue
            cut = nn.Parameter(parameter.detach()[self.first : end].clone(), requires_grad=False)
            setattr(whole, key, note_shape(cut, parameter.shape))
        if hasattr(whole, "num_experts"):
            setattr(whole, "num_experts", self.count)  # noqa: B010 -- nn.Module's attributes have no types
        self.__dict__["local"] = whole
        self._parameters, self._buffers, self._modules = whole._parameters, whole._buffers, whole._modules
        self._mixture = self.divided(ModuleExperts).mixture

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._mixture(hidden_states, top_k_index, top_k_weights)

    def divided(self, kind: type[ModuleExperts] | type[SortedExperts]) -> SlicedExperts:
        """All experts, this rank's by ``kind``."""
        return SlicedExperts(kind(self.local), self.first, self.count, self.together, self.name)

    def weights(self) -> Iterator[Sequence[Tensor]]:
        """Every expert's weight matrices in turn; all ranks must ask together."""
        stacked = [p for p in self.parameters(recurse=False) if p.dim() == 3]
        for owner, (first, end) in enumerate(pairwise(self.bounds)):
            for expert in range(first, end):
                mine = owner == self.together.rank
                found = [p[expert - first].clone() if mine else torch.zeros_like(p[0]) for p in stacked]
                yield [self.together.sum(matrix, f"{self.name}, weights of {expert}") for matrix in found]


def note_shape(share: nn.Parameter, whole: Sequence[int]) -> nn.Parameter:
    """Note beside a rank's share of a parameter what shape the whole has, where DeepSpeed notes it too."""
    setattr(share, "ds_shape", tuple(whole))  # noqa: B010 -- parameters declare no such attribute
    return share


def expert_weights(module: nn.Module, num_experts: int) -> Iterator[Sequence[Tensor]]:
    """Every expert's weight matrices in turn, also where they are divided over ranks: then every rank must ask."""
    if isinstance(module, DividedExperts):
        yield from module.weights()
        return
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in stacked]
    for expert in range(num_experts):
        yield [p[expert] for p in whole]
