"""Corrections for testing a family of cells. A cell without a p value is NaN: it stays NaN and does not count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests


def bonferroni(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjusted p values [cells]: p times the number of tests, at most 1."""
    return _adjusted(p, lambda tested: multipletests(tested, method="bonferroni")[1])


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjusted p values [cells] of Holm's step-down procedure (Holm 1979): family-wise error rate."""
    return _adjusted(p, _step_down)


def benjamini_hochberg(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjusted p values [cells] of Benjamini and Hochberg (1995): false discovery rate."""
    return _adjusted(p, lambda tested: multipletests(tested, method="fdr_bh")[1])


def _step_down(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's adjustment; statsmodels' collects garbage at every call, a tenth of a second beside a loaded torch."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)


def _adjusted(
    p: NDArray[np.float64], correction: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    adjusted = np.full(len(p), np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        adjusted[tested] = correction(p[tested])
    return adjusted
