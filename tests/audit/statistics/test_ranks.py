"""Rank agreement within tokens against scipy, row by row."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from audit.statistics import kendall_rows, spearman_rows, top1_hits


def rows(experts: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(experts)
    a, b = generator.normal(size=(2, 200, experts))
    b += a * 0.5
    if ties:
        a, b = np.round(a), np.round(b)  # many ties, some constant rows
    a[3], b[4] = 1.5, -2.0
    a[5, 0] = np.inf
    a[6] = np.inf
    return a, b


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_correlations_are_those_of_scipy(experts: int, ties: bool) -> None:
    a, b = rows(experts, ties)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant rows
        rho = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
        tau = [stats.kendalltau(x, y, variant="b").statistic for x, y in zip(a, b, strict=True)]
    assert np.isnan(rho[3])
    assert np.isnan(rho[4])
    np.testing.assert_allclose(spearman_rows(a, b), rho, atol=1e-12)
    np.testing.assert_allclose(kendall_rows(a, b), tau, atol=1e-12)


def test_an_unknown_value_makes_its_row_unknown() -> None:
    a, b = rows(4, ties=False)
    a[0, 2] = b[1, 0] = np.nan
    for values in (spearman_rows(a, b), kendall_rows(a, b), *top1_hits(a, b)):
        assert np.isnan(values[:2]).all()
        assert not np.isnan(values[2])


def test_one_expert_has_no_order() -> None:
    one = np.array([[0.3], [0.7]])
    assert np.isnan(spearman_rows(one, one)).all()
    assert np.isnan(kendall_rows(one, one)).all()
    hit, chance = top1_hits(one, one)
    assert hit.tolist() == chance.tolist() == [1.0, 1.0]


def test_a_hit_shared_by_ties_is_a_share_and_chance_counts_the_targets() -> None:
    a = np.array([[1.0, 2, 3, 0], [3, 3, 1, 0], [3, 3, 1, 0], [5, 5, 5, 5], [0, 0, 0, 9]])
    b = np.array([[0.0, 0, 1, 0], [7, 1, 1, 1], [7, 7, 7, 1], [0, 2, 1, 2], [4, 3, 2, 1]])
    hit, chance = top1_hits(a, b)
    assert hit.tolist() == [1, 0.5, 1, 0.5, 0]
    assert chance.tolist() == [0.25, 0.25, 0.75, 0.5, 0.25]


def test_chance_is_the_hit_rate_of_a_random_order() -> None:
    _, b = rows(4, ties=True)
    b = np.repeat(b, 50, axis=0)
    a = np.random.default_rng(9).normal(size=b.shape)
    hit, chance = top1_hits(a, b)
    se = np.sqrt((chance * (1 - chance)).sum()) / len(b)
    assert abs(hit.mean() - chance.mean()) < 4 * se
