"""Two ways to compute experts: through the model's own module, or with rows sorted by expert.

Shapes: N rows, K slots, D hidden, E experts. An output is un-weighted; a contribution is the routing weight times it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audit.models.linear import chosen_linear, whole_rows
from audit.models.seam import first_tensor
from audit.models.shards.errors import out_of_memory


class Experts(Protocol):
    """Computes the experts of one layer for rows."""

    def outputs(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        """Un-weighted outputs [N, K, D], slot by slot."""

    def mixture(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum over the slots [N, D]: what the experts module returns."""

    def both(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`outputs` and :meth:`mixture`."""


class ModuleExperts:
    """The model's own experts module; the reference for every other path."""

    def __init__(self, module: nn.Module) -> None:
        # The forward as it is now: later the engine replaces the instance's forward by its own.
        self._forward: Callable[..., Any] = module.forward

    def mixture(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return first_tensor(self._forward(x_ND, index_NK, weights_NK))

    def outputs(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        N, K = index_NK.shape
        ones = torch.ones(N * K, 1, dtype=x_ND.dtype, device=x_ND.device)
        rows = x_ND.repeat_interleave(K, dim=0)
        return self.mixture(rows, index_NK.reshape(-1, 1), ones).view(N, K, -1)

    def both(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs(x_ND, index_NK), self.mixture(x_ND, index_NK, weights_NK)


class SortedExperts:
    """Rows sorted by expert once, then one matrix product per expert on a contiguous slice.

    Reads the layout flags that transformers' experts interface defines (gate, bias, transposition). Used only where
    :func:`agrees` has compared it with the module at load.
    """

    def __init__(self, module: nn.Module) -> None:
        if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
            raise ValueError(f"{type(module).__name__} does not declare its layout")
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(f"{type(module).__name__} normalises each expert's output")
        self._module: Any = module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        self._up, self._down = up, "down_proj"
        self._experts = int(getattr(module, up).shape[0])

    def _matrices(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """Every expert's matrix, as torch.nn.functional.linear takes it, and its bias."""
        weights = getattr(self._module, name).unbind()
        biases = getattr(self._module, name + "_bias").unbind() if self._module.has_bias else [None] * len(weights)
        return [(w.T if self._module.is_transposed else w, b) for w, b in zip(weights, biases, strict=True)]

    def _sorted_outputs(self, x_ND: Tensor, index_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs in order of expert, with gaps, and for each slot where its output stands [N, K].

        Every expert has room for a round number of rows, so that few shapes of product occur (see audit.models.linear);
        the rows that fill it up are copies of the first, and nobody reads their outputs.
        """
        N, K = index_NK.shape
        flat = index_NK.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts_E = torch.bincount(flat, minlength=self._experts)
        room = [whole_rows(count) if count else 0 for count in counts_E.tolist()]
        ends_E = torch.tensor(room, device=flat.device).cumsum(0)
        shift_E = ends_E - torch.tensor(room, device=flat.device) - (counts_E.cumsum(0) - counts_E)
        place_S = torch.arange(N * K, device=flat.device) + shift_E[flat[order]]  # of the sorted slots
        source = torch.zeros(sum(room), dtype=torch.long, device=flat.device)
        source[place_S] = order.div(K, rounding_mode="floor")
        rows = x_ND.index_select(0, source)
        out = torch.empty_like(rows)
        activate = self._module._apply_gate if self._module.has_gate else self._module.act_fn
        with chosen_linear() as linear:
            up, down = self._matrices(self._up), self._matrices(self._down)
            start = 0
            for expert, size in enumerate(room):
                if size:
                    hidden = activate(linear(rows[start : start + size], *up[expert]))
                    out[start : start + size] = linear(hidden, *down[expert])
                    start += size
        place = torch.empty_like(order)
        place[order] = place_S
        return out, place.view(N, K)

    def outputs(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        out, place_NK = self._sorted_outputs(x_ND, index_NK)
        return out.index_select(0, place_NK.reshape(-1)).view(*index_NK.shape, -1)

    def mixture(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        out, place_NK = self._sorted_outputs(x_ND, index_NK)
        return _weighted_sum(out, place_NK, weights_NK)

    def both(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        out, place_NK = self._sorted_outputs(x_ND, index_NK)
        outputs_NKD = out.index_select(0, place_NK.reshape(-1)).view(*index_NK.shape, -1)
        return outputs_NKD, _weighted_sum(out, place_NK, weights_NK)


def _weighted_sum(out: Tensor, place_NK: Tensor, weights_NK: Tensor) -> Tensor:
    # One fused gather, weighting and sum, each row in slot order: the same bits however rows are batched.
    return F.embedding_bag(place_NK, out, mode="sum", per_sample_weights=weights_NK.to(out.dtype))


def experts_of(module: nn.Module, kind: type[ModuleExperts] | type[SortedExperts]) -> Experts:
    """The module's experts computed by ``kind``, also where a back end has divided them over ranks.

    Raises ValueError where ``kind`` does not know the module's layout.
    """
    divided = getattr(module, "divided", None)
    experts: Experts = kind(module) if divided is None else divided(kind)
    return experts


def agrees(module: nn.Module, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> bool:
    """Whether the sorted path reproduces the module on these rows, to rounding."""
    try:
        ours = experts_of(module, SortedExperts)
        mixture, outputs = ours.mixture(x_ND, index_NK, weights_NK), ours.outputs(x_ND, index_NK)
    except (ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return False
    reference = experts_of(module, ModuleExperts)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(x_ND.dtype, 3e-2)
    exact, slots = reference.mixture(x_ND, index_NK, weights_NK), reference.outputs(x_ND, index_NK)
    return _close(mixture, exact, tolerance) and _close(outputs, slots, tolerance)


def _close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    return bool(((ours - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1e-30)).item())
