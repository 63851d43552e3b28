"""Paired tests against scipy and statsmodels, and where they have nothing to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from audit.statistics import cluster_t, paired_t, sign_test, superiority, wilcoxon


def sample(seed: int, n: int, zeros: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.where(generator.random(n) < zeros, 0.0, generator.standard_t(4, n) + 0.2)


@pytest.mark.parametrize("n", [2, 9, 200])
def test_paired_t_is_that_of_two_related_samples(n: int) -> None:
    low = np.random.default_rng(1).normal(size=n)
    diff = sample(0, n)
    assert paired_t(diff) == pytest.approx(stats.ttest_rel(low + diff, low).pvalue, rel=1e-9)


@pytest.mark.parametrize(("documents", "offset"), [(2, 0.0), (7, 0.0), (60, 0.3), (60, 1e6)])
def test_cluster_t_is_the_cluster_robust_covariance_of_statsmodels(documents: int, offset: float) -> None:
    generator = np.random.default_rng(documents)
    document = generator.integers(0, documents, 300)
    diff = sample(2, 300) + generator.normal(size=documents)[document] * 0.5 + offset
    fit = sm.OLS(diff, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": document}, use_t=True)
    document = document * 17 - 5  # any integers will do
    assert cluster_t(diff, document) == pytest.approx(fit.pvalues[0], rel=1e-7)


def test_cluster_t_of_documents_of_one_pair_is_the_paired_t() -> None:
    diff = sample(3, 50)
    assert cluster_t(diff, np.arange(50)) == pytest.approx(paired_t(diff), rel=1e-9)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("n", [12, 400])
def test_rank_and_sign_tests_drop_zeros(n: int, zeros: float) -> None:
    diff = sample(4, n, zeros)
    kept = diff[diff != 0]
    ranks = stats.rankdata(np.abs(kept))
    positive = ranks[kept > 0].sum()
    total = len(kept) * (len(kept) + 1) / 2
    if n < 50:  # every assignment of signs, counted by the number of ways to reach a rank sum
        ways = np.zeros(int(total) + 1)
        ways[0] = 1
        for rank in ranks.astype(int):
            ways[rank:] = ways[rank:] + ways[:-rank]
        tail = ways[: int(min(positive, total - positive)) + 1].sum() / ways.sum()
        expected = min(1.0, 2 * tail)
    else:
        z = (positive - total / 2) / math.sqrt((ranks**2).sum() / 4)
        expected = 2 * stats.norm.sf(abs(z))
    assert wilcoxon(diff) == pytest.approx(expected, rel=1e-9)
    fewer = min((kept > 0).sum(), (kept < 0).sum())
    assert sign_test(diff) == pytest.approx(min(1.0, 2 * stats.binom.cdf(fewer, len(kept), 0.5)), rel=1e-9)


def test_superiority_counts_a_tie_as_a_half() -> None:
    low = np.array([0.0, 1.0, 2.0, 3.0, 5.0])
    high = np.array([1.0, 1.0, 1.0, 9.0, 6.0])
    pairs = [1.0 if h > low_ else 0.5 if h == low_ else 0.0 for h, low_ in zip(high, low, strict=True)]
    assert superiority(high - low) == sum(pairs) / 5 == 0.7


def test_tests_without_an_answer_are_nan_and_only_those() -> None:
    one, zeros, equal = np.array([0.3]), np.zeros(6), np.full(6, 0.1)
    document = np.array([0, 0, 1, 1, 2, 2])
    assert math.isnan(paired_t(one))
    assert math.isnan(paired_t(zeros))
    assert math.isnan(paired_t(equal))
    assert math.isnan(cluster_t(zeros, document))
    assert math.isnan(cluster_t(equal, document))
    assert math.isnan(cluster_t(sample(0, 6), np.zeros(6, int)))
    assert math.isnan(cluster_t(np.array([0.1, 0.3, 0.3, 0.1, 0.1, 0.3]), document))  # documents have one mean
    assert math.isnan(wilcoxon(zeros))
    assert math.isnan(sign_test(zeros))
    assert math.isnan(superiority(np.array([])))
    assert superiority(zeros) == 0.5
    assert wilcoxon(equal) == pytest.approx(2 / 2**6)  # ties of rank, all signs positive
    assert sign_test(equal) == pytest.approx(2 / 2**6)
    assert wilcoxon(one) == sign_test(one) == 1.0
