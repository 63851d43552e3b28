"""Both ways to compute experts against a loop over rows and slots that reads the weights by their documented layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SWEEP, build
from torch import Tensor, nn
from torch.nn import functional as F

from audit.models.discovery import decoder_layers, find_sites
from audit.models.experts import ModuleExperts, SortedExperts, agrees

N, K, E, D = 23, 3, 8, 64


def experts_of(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    sites = find_sites(decoder_layers(build(family, 5, dtype)))
    return sites[max(sites)].experts


def rows(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    # Experts 0 and 6 get nothing, and rows need not be routed to different experts.
    index = torch.tensor([1, 2, 3, 4, 5, 7])[torch.randint(0, 6, (n, K), generator=generator)]
    weights = torch.randn(n, K, generator=generator, dtype=torch.float64)
    return x.to(dtype), index, weights.to(dtype)


def one_output(family: str, module: Any, x: Tensor, expert: int) -> Tensor:
    """What one expert makes of one row."""
    if family == "gpt_oss":  # input-major weights, gate and up interleaved, biases, its own clamped gate
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        hidden = (up + 1.0) * gate * torch.sigmoid(1.702 * gate)
        return hidden @ module.down_proj[expert] + module.down_proj_bias[expert]
    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
    return module.down_proj[expert] @ (F.silu(gate) * up)


FAMILIES = ["olmoe", "gpt_oss", "granitemoe", "deepseek_v3", "phimoe", "hunyuan_v1_moe", "minimax_m2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [ModuleExperts, SortedExperts])
def test_equals_a_loop(family: str, way: Any) -> None:
    module = experts_of(family)
    x, index, weights = rows()
    with torch.inference_mode():
        want = torch.stack(
            [torch.stack([one_output(family, module, x[n], int(e)) for e in index[n]]) for n in range(N)]
        )
        mixture = torch.einsum("nk,nkd->nd", weights, want)
        path = way(module)
        both = path.both(x, index, weights)
        for found, expected in (
            (path.outputs(x, index), want),
            (path.mixture(x, index, weights), mixture),
            (both[0], want),
            (both[1], mixture),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", SWEEP)
def test_both_ways_agree_in_every_family(family: str) -> None:
    for dtype, n in ((torch.float64, 1), (torch.float64, 40), (torch.float32, 700), (torch.bfloat16, 40)):
        module = experts_of(family, dtype)
        x, index, weights = rows(dtype, n)
        with torch.inference_mode():
            assert agrees(module, x, index, weights)


def test_a_row_gives_the_same_bits_in_any_company() -> None:
    """Contributions of a row must not depend on its place among equal rows of one expert."""
    module = experts_of("olmoe")
    x, index, weights = rows()
    with torch.inference_mode():
        path = SortedExperts(module)
        whole = path.mixture(x, index, weights)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        shuffled = path.mixture(x[order], index[order], weights[order])
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-13, atol=1e-13)


class Doubled(nn.Module):
    """Declares the common layout but computes something else."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = inner.gate_up_proj, inner.down_proj
        self.inner = inner

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return 1.001 * self.inner(hidden, index, weights)


def test_a_module_that_computes_something_else_is_not_trusted() -> None:
    x, index, weights = rows()
    inner = experts_of("olmoe")
    with torch.inference_mode():
        assert not agrees(Doubled(inner), x, index, weights)
        outputs = ModuleExperts(Doubled(inner)).outputs(x, index)
        torch.testing.assert_close(outputs, 1.001 * ModuleExperts(inner).outputs(x, index))


def test_a_layout_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear does not declare its layout"):
        SortedExperts(nn.Linear(2, 2))
    module = experts_of("olmoe")
    module.has_post_expert_norm = True
    with pytest.raises(ValueError, match="normalises each expert's output"):
        SortedExperts(module)
