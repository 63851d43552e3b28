"""Experts divided over the ranks of a group: each holds some experts of every layer, and what they give is added up.

Everything but the experts is on every rank, and every rank runs the same work. Shapes: N rows, K slots, D hidden, E
experts; M slots of this rank's own experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from audit.models.discovery import ModelError, Site
from audit.models.experts import Experts
from audit.models.moe_model import MoEModel

_PROBE_ROWS = 16


class SlicedExperts:
    """The experts ``first`` up to ``first + count`` are here, computed by ``local``, which counts them from 0."""

    def __init__(self, local: Experts, first: int, count: int) -> None:
        self._local, self._first, self._count = local, first, count

    def outputs(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        return _sum(self._own(_enter(x_ND), index_NK))

    def mixture(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        x_ND, weights_NK = _enter(x_ND), _enter(weights_NK)
        return _sum(_weighted(self._own(x_ND, index_NK), weights_NK))

    def both(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weights_NK = _enter(x_ND), _enter(weights_NK)
        own_NKD = self._own(x_ND, index_NK)
        return _sum(own_NKD), _sum(_weighted(own_NKD, weights_NK))

    def _own(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        """Outputs [N, K, D] of this rank's experts, zero for the slots of others."""
        N, K = index_NK.shape
        local = index_NK.reshape(-1) - self._first
        place_M = torch.nonzero((local >= 0) & (local < self._count)).flatten()
        out = x_ND.new_zeros(N * K, x_ND.shape[-1]) + x_ND[:0].sum()  # a gradient passes here on every rank or on none
        if len(place_M):
            rows = x_ND.index_select(0, place_M.div(K, rounding_mode="floor"))
            out = out.index_copy(0, place_M, self._local.outputs(rows, local[place_M][:, None])[:, 0])
        return out.view(N, K, -1)


def _weighted(outputs_NKD: Tensor, weights_NK: Tensor) -> Tensor:
    return (outputs_NKD * weights_NK.to(outputs_NKD.dtype)[..., None]).sum(1)


class _Enter(torch.autograd.Function):
    """What every rank has; each finds its part of the gradient, and they add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


class _Sum(torch.autograd.Function):
    """The sum over the ranks, which every rank has afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _enter(x: Tensor) -> Tensor:
    entered: Tensor = _Enter.apply(x)  # type: ignore[no-untyped-call]
    return entered


def _sum(x: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return summed


def _all_reduced(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def require_enough(model: MoEModel, ranks: int) -> None:
    """Raise ModelError where a layer has fewer experts than there are ranks to hold them."""
    for layer, site in model.sites.items():
        if ranks > site.num_experts:
            raise ModelError(
                f"cluster.ranks: {ranks} is more than the {site.num_experts} experts of layer {layer}; use at most "
                f"{site.num_experts}"
            )


def slice_experts(model: MoEModel, rank: int, ranks: int) -> None:
    """Keep this rank's share of every layer's experts; from here on the ranks of the process group work together.

    Raises ModelError where there are too few experts, or where a layer's experts module computes something else once
    its weights are cut.
    """
    require_enough(model, ranks)
    with model.kernels():
        for layer, site in model.sites.items():
            _slice(model, layer, site, rank, ranks)


def _slice(model: MoEModel, layer: int, site: Site, rank: int, ranks: int) -> None:
    whole, module = model.experts[layer], site.experts
    probe = _probe(model, site)
    expected = whole.mixture(*probe)
    bounds = [site.num_experts * r // ranks for r in range(ranks + 1)]
    first, end = bounds[rank], bounds[rank + 1]
    stacked = [(name, p) for name, p in module.named_parameters(recurse=False) if p.shape[:1] == (site.num_experts,)]
    with torch.inference_mode(False):  # attribution runs gradients through them
        for name, parameter in stacked:
            setattr(module, name, nn.Parameter(parameter.detach()[first:end].clone(), requires_grad=False))
    if hasattr(module, "num_experts"):
        setattr(module, "num_experts", end - first)  # noqa: B010 -- nn.Module's attributes have no types
    try:
        sliced = SlicedExperts(type(whole)(module), first, end - first)  # type: ignore[call-arg]
        found = sliced.mixture(*probe)
    except (ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ModelError(_refusal(model, layer, type(error).__name__)) from error
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 5e-2)
    distance = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not distance <= tolerance:
        raise ModelError(_refusal(model, layer, f"they differ by {distance:.1e}"))
    module.__dict__["forward"] = sliced.mixture
    module.__dict__["bounds"] = bounds
    model.experts[layer] = sliced


def _probe(model: MoEModel, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that reach every expert."""
    generator = torch.Generator().manual_seed(0)
    rows = max(_PROBE_ROWS, site.num_experts)
    weight = next(p for p in site.experts.parameters(recurse=False) if p.dim() == 3)
    x_ND = torch.randn(rows, model.description.hidden_size, generator=generator).to(weight)
    index_NK = (torch.arange(rows)[:, None] + torch.arange(site.top_k)) % site.num_experts
    weights_NK = torch.rand(rows, site.top_k, generator=generator)
    return x_ND, index_NK.to(weight.device), weights_NK.to(weight)


def _refusal(model: MoEModel, layer: int, why: str) -> str:
    return (
        f"cluster.ranks: the experts of layer {layer} of {model.description.source} cannot be divided over ranks "
        f"({why}); use 1"
    )


def expert_weights(module: nn.Module, num_experts: int) -> Iterator[Sequence[Tensor]]:
    """Every expert's weight matrices in turn, also where they are divided over ranks: then every rank must ask."""
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    bounds: list[int] = module.__dict__.get("bounds", [0, num_experts])
    for owner, (first, end) in enumerate(pairwise(bounds)):
        for expert in range(first, end):
            if len(bounds) == 2:
                yield [p[expert] for p in stacked]
                continue
            mine = owner == dist.get_rank()
            matrices = [(p[expert - first] if mine else torch.empty_like(p[0])).contiguous() for p in stacked]
            for matrix in matrices:
                dist.broadcast(matrix, owner)
            yield matrices
