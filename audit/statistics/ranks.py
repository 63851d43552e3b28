"""Agreement of two orders of the same experts, token by token.

Shapes: N tokens, K active experts. A row that holds NaN on either side gives NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def spearman_rows(a_NK: NDArray[np.float64], b_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rho of every row [N], ties at their mean rank. NaN where either side is constant."""
    assert a_NK.shape == b_NK.shape
    rank_a_NK = stats.rankdata(a_NK, axis=1) - (a_NK.shape[1] + 1) / 2
    rank_b_NK = stats.rankdata(b_NK, axis=1) - (b_NK.shape[1] + 1) / 2
    product_N = (rank_a_NK * rank_b_NK).sum(axis=1)
    return _ratio(product_N, (rank_a_NK**2).sum(axis=1) * (rank_b_NK**2).sum(axis=1))


def kendall_rows(a_NK: NDArray[np.float64], b_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's tau-b of every row [N]. NaN where either side is constant."""
    assert a_NK.shape == b_NK.shape
    balance_N, pairs_a_N, pairs_b_N = (np.zeros(len(a_NK)) for _ in range(3))
    for slot in range(a_NK.shape[1] - 1):  # a slot against all later ones: K times less memory than all pairs at once
        order_a_NJ = _order(a_NK[:, slot, None], a_NK[:, slot + 1 :])
        order_b_NJ = _order(b_NK[:, slot, None], b_NK[:, slot + 1 :])
        balance_N += (order_a_NJ * order_b_NJ).sum(axis=1)
        pairs_a_N += (order_a_NJ != 0).sum(axis=1)
        pairs_b_N += (order_b_NJ != 0).sum(axis=1)
    tau_N = _ratio(balance_N, pairs_a_N * pairs_b_N)
    return np.where(_unknown(a_NK, b_NK), np.nan, tau_N)


def top1_hits(a_NK: NDArray[np.float64], b_NK: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often the top expert of ``a`` is a top expert of ``b``: (hit [N], chance [N]).

    With A and B the experts tied at the top of a and of b, hit = |A and B| / |A|, the probability that an expert
    drawn from A is in B; chance = |B| / K, that of an expert drawn from all K. Without ties a hit is 0 or 1 and chance
    is 1 / K.
    """
    assert a_NK.shape == b_NK.shape
    top_a_NK = a_NK == a_NK.max(axis=1, keepdims=True)
    top_b_NK = b_NK == b_NK.max(axis=1, keepdims=True)
    known_N = np.where(_unknown(a_NK, b_NK), np.nan, 1.0)
    hit_N = (top_a_NK & top_b_NK).sum(axis=1) / np.maximum(top_a_NK.sum(axis=1), 1)
    return hit_N * known_N, top_b_NK.mean(axis=1) * known_N


def _order(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.int8]:
    """Sign of a - b without the subtraction, which has no sign for two infinities."""
    return (a > b).astype(np.int8) - (a < b).astype(np.int8)


def _unknown(a_NK: NDArray[np.float64], b_NK: NDArray[np.float64]) -> NDArray[np.bool_]:
    # A maximum passes NaN on.
    unknown_N: NDArray[np.bool_] = np.logical_or(np.isnan(a_NK.max(axis=1)), np.isnan(b_NK.max(axis=1)))
    return unknown_N


def _ratio(numerator_N: NDArray[np.float64], square_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """numerator / sqrt(square); NaN where the square is 0."""
    ratio_N = np.full(len(numerator_N), np.nan)
    np.divide(numerator_N, np.sqrt(square_N), out=ratio_N, where=square_N > 0)
    return ratio_N
