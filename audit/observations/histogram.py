"""A fixed histogram of routing weights, and the Gini coefficient read from it with a bound on its error.

The bins are the leading bits of the floating-point number: 128 equal bins in each of 32 octaves, 2^-24 to 2^8, so the
width of a bin is at most 1/128 of any weight in it, whatever a family scales its weights by. The first bin reaches
down to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 4096
LIMIT = 256  # weights lie in [0, LIMIT)
_MANTISSA_BITS = 7  # of a bin: 128 bins per octave
_LOWEST_EXPONENT = -24
_FIRST = (1023 + _LOWEST_EXPONENT) << _MANTISSA_BITS


def bin_of(weight: Tensor) -> Tensor:
    """Bin (int64, 0 to 4,095) of float64 weights in [0, 256). Exact: the mantissa is cut, nothing is rounded."""
    return ((weight.contiguous().view(torch.int64) >> (52 - _MANTISSA_BITS)) - _FIRST).clamp(min=0)


def edges() -> Tensor:
    """The 4,097 edges of the bins, float64."""
    inner = ((torch.arange(1, BINS) + _FIRST) << (52 - _MANTISSA_BITS)).view(torch.float64)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), LIMIT)])


def gini(histogram_B: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gini coefficient of the weights in ``histogram_B`` [..., B], whose sum is ``total`` [...]; bound on its error.

    G = sum_ij |g_i - g_j| / (2 n^2 mean) = sum_i (2 i - n - 1) g_(i) / (n sum g), g_(i) ascending. Every weight is
    read as the middle of its bin, which keeps their order, so the error is at most sum_i |2 i - n - 1| h_(i) / (n sum
    g), h the half width of the bin. As h <= g/256, that is below 1/256 = 0.0039 (plus 2^-25/mean, for weights below
    2^-24). NaN where there is no weight.
    """
    edge = edges()
    middle_B, half_B = (edge[1:] + edge[:-1]) / 2, (edge[1:] - edge[:-1]) / 2
    high = histogram_B.cumsum(-1)
    low = high - histogram_B
    n = high[..., -1:]
    signed = histogram_B * (low + high - n)  # sum of 2 i - n - 1 over the ranks of a bin
    absolute = _absolute_ranks(high, n) - _absolute_ranks(low, n)
    scale = n[..., 0] * total
    return (signed * middle_B).sum(-1) / scale, (absolute * half_B).sum(-1) / scale


def _absolute_ranks(rank: Tensor, n: Tensor) -> Tensor:
    """Sum of |2 i - n - 1| over i = 1..rank."""
    whole = 2 * (n // 2) * (n - n // 2)
    return torch.where(2 * rank <= n, rank * (n - rank), whole - rank * (n - rank))
