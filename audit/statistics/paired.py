"""Tests of paired differences: is the effect of the high-ranked expert different from that of the low-ranked one?

Shapes: N pairs. Differences hold no NaN; what a test cannot say is NaN, for the reason its docstring gives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

ROUNDING = 1e-13  # a spread below this share of the sum of the absolute values is rounding error of equal values


def paired_t(diff_N: NDArray[np.float64]) -> float:
    """Two-sided p of the paired t test of mean 0. NaN with fewer than 2 pairs or where all differences are equal."""
    if len(diff_N) < 2 or np.ptp(diff_N) == 0:
        return float("nan")
    return float(stats.ttest_1samp(diff_N, 0.0).pvalue)


def cluster_t(diff_N: NDArray[np.float64], cluster_N: NDArray[np.int64]) -> float:
    """Two-sided p of mean 0 with pairs of one document (cluster) allowed to depend on each other.

    Variance of the mean: G / (G - 1) * sum over the G clusters of (sum of its residuals)^2 / N^2, with G - 1 degrees
    of freedom; the factor (N - 1) / (N - 1) of CR1 is 1 for a mean (Cameron and Miller 2015, eq. 11-12). NaN with one
    cluster, and where no cluster's residuals sum to anything but 0 (all differences equal, for one).
    """
    assert len(diff_N) == len(cluster_N)
    clusters, index_N = np.unique(cluster_N, return_inverse=True)
    count = len(clusters)
    if count < 2:
        return float("nan")
    mean = float(diff_N.mean())
    spread = float(np.linalg.norm(np.bincount(index_N, weights=diff_N - mean)))
    if spread <= ROUNDING * np.abs(diff_N).sum():
        return float("nan")
    t = mean * len(diff_N) / (spread * np.sqrt(count / (count - 1)))
    return float(2 * special.stdtr(count - 1, -abs(t)))


def wilcoxon(diff_N: NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, zeros dropped. NaN where nothing but zeros is left."""
    nonzero_N = diff_N[diff_N != 0]
    return float(stats.wilcoxon(nonzero_N).pvalue) if len(nonzero_N) else float("nan")


def sign_test(diff_N: NDArray[np.float64]) -> float:
    """Two-sided exact p of the sign test, zeros dropped. NaN where nothing but zeros is left."""
    positive, nonzero = int((diff_N > 0).sum()), int((diff_N != 0).sum())
    return float(stats.binomtest(positive, nonzero).pvalue) if nonzero else float("nan")


def superiority(diff_N: NDArray[np.float64]) -> float:
    """P(difference > 0) + P(difference = 0) / 2: 0.5 where neither end is larger. NaN without pairs."""
    return float(superiority_scores(diff_N).mean()) if len(diff_N) else float("nan")


def superiority_scores(diff_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for a positive difference, 0.5 for a tie, 0 for a negative one; their mean is ``superiority``."""
    return (np.sign(diff_N) + 1) / 2
