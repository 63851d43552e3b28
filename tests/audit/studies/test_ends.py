"""The ends of a ranking: tied experts stand together, experts without a score do not stand at all."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from audit.studies.ends import ends, shuffled_rankings, shuffled_within_tokens, standardized


@pytest.mark.parametrize("active", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ends_are_those_of_a_plain_loop(active: int, seed: int) -> None:
    rng = np.random.default_rng([seed, active])
    score_NK = rng.choice([0.0, 1.0, 2.0, 2.0, np.nan, -np.inf, np.inf], (300, active))  # ties everywhere
    effect_NKO = rng.standard_normal((300, active, 2))
    expert_NK = np.argsort(rng.random((300, 9)), axis=1)[:, :active]
    found = ends(score_NK)
    high_NO, low_NO = found.effects(effect_NKO)
    experts = found.experts(expert_NK)
    kinds = Counter()
    for n, scores in enumerate(score_NK.tolist()):
        ranked = {k: score for k, score in enumerate(scores) if not np.isnan(score)}
        if not ranked or min(ranked.values()) == max(ranked.values()):
            assert not found.paired_N[n]
            assert found.high_NK[n].any() == bool(ranked)
            kinds["unpaired" if ranked else "unranked"] += 1
            continue
        assert found.paired_N[n]
        for extreme, effect_NO, expert_N in ((max, high_NO, experts[0]), (min, low_NO, experts[1])):
            at = [k for k, score in ranked.items() if score == extreme(ranked.values())]
            np.testing.assert_allclose(effect_NO[n], np.mean([effect_NKO[n, k] for k in at], axis=0))
            assert expert_N[n] == (expert_NK[n, at[0]] if len(at) == 1 else -1)
            kinds["alone" if len(at) == 1 else "tied"] += 1
    assert kinds["unpaired"] > 0
    assert (kinds["tied"] > 0) == (active > 2)
    assert (kinds["alone"] > 0) == (active > 1)


def test_tied_experts_stand_together_by_their_mean() -> None:
    score_NK = np.array([[3.0, 3.0, 1.0], [3.0, 1.0, 1.0], [2.0, 2.0, 2.0], [2.0, np.nan, 1.0], [np.nan] * 3])
    effect_NKO = np.array([10.0, 30.0, 100.0])[None, :, None].repeat(5, 0)
    expert_NK = np.array([4, 5, 6])[None].repeat(5, 0)
    found = ends(score_NK)
    assert found.paired_N.tolist() == [True, True, False, True, False]
    high_NO, low_NO = found.effects(effect_NKO)
    assert high_NO[:, 0][found.paired_N].tolist() == [20.0, 10.0, 10.0]
    assert low_NO[:, 0][found.paired_N].tolist() == [100.0, 65.0, 100.0]
    high_N, low_N = found.experts(expert_NK)
    assert high_N[found.paired_N].tolist() == [-1, 4, 4]
    assert low_N[found.paired_N].tolist() == [6, -1, 6]


@pytest.mark.filterwarnings("error")
def test_effects_that_are_not_finite_reach_only_their_own_token() -> None:
    score_NK = np.array([[2.0, 2.0, 1.0], [2.0, 1.5, 1.0], [2.0, 2.0, 1.0]])
    effect_NKO = np.array([[np.inf, -np.inf, 1.0], [3.0, np.nan, 1.0], [np.nan, 4.0, 0.0]])[..., None]
    high_NO, low_NO = ends(score_NK).effects(effect_NKO)
    np.testing.assert_array_equal(high_NO[:, 0], [np.nan, 3.0, np.nan])
    np.testing.assert_array_equal(low_NO[:, 0], [1.0, 1.0, 0.0])


@pytest.mark.filterwarnings("error")
def test_d_is_that_of_scipys_paired_t_over_finite_pairs() -> None:
    rng = np.random.default_rng(0)
    high_NO, low_NO = rng.normal(0.3, 1, (50, 5)), rng.standard_normal((50, 5))
    paired_N = rng.random(50) < 0.7
    high_NO[3, 0], high_NO[4:6, 0], low_NO[4, 0] = np.nan, np.inf, np.inf
    high_NO[:, 2] = low_NO[:, 2]
    low_NO[:, 3] = np.nan
    high_NO[np.flatnonzero(paired_N)[1:], 4] = np.nan
    d_O, count_O = standardized(high_NO, low_NO, paired_N)
    for o in (0, 1):
        kept = paired_N & np.isfinite(high_NO[:, o]) & np.isfinite(low_NO[:, o])
        expected = stats.ttest_rel(high_NO[kept, o], low_NO[kept, o]).statistic / np.sqrt(kept.sum())
        assert d_O[o] == pytest.approx(expected)
        assert count_O[o] == kept.sum()
    assert np.isnan(d_O[2:]).all()  # no difference, no pair, one pair
    assert count_O[2:].tolist() == [paired_N.sum(), 0, 1]


def test_every_order_of_the_ranked_experts_is_equally_likely() -> None:
    value_E = np.array([5.0, np.nan, 1.0, 3.0])
    drawn = list(shuffled_rankings(value_E, 1200, np.random.default_rng(0)))
    assert all(np.isnan(ranking[1]) for ranking in drawn)
    counted = Counter(tuple(ranking[[0, 2, 3]].tolist()) for ranking in drawn)
    assert set(counted) == set(permutations([5.0, 1.0, 3.0]))
    assert stats.chisquare(list(counted.values())).pvalue > 1e-3


def test_scores_are_permuted_within_their_token_and_over_its_scored_experts_alone() -> None:
    score_NK = np.array([[1.0, 2.0, 3.0], [7.0, np.nan, 7.5], [np.nan, np.nan, 4.0], [np.nan] * 3])
    drawn = np.array(list(shuffled_within_tokens(score_NK, 1200, np.random.default_rng(0))))
    assert (np.isnan(drawn) == np.isnan(score_NK)).all()
    first = Counter(map(tuple, drawn[:, 0].tolist()))
    assert set(first) == set(permutations([1.0, 2.0, 3.0]))
    assert stats.chisquare(list(first.values())).pvalue > 1e-3
    assert set(map(tuple, drawn[:, 1][:, [0, 2]].tolist())) == {(7.0, 7.5), (7.5, 7.0)}
    assert (drawn[:, 2, 2] == 4.0).all()
    kept, turned = drawn[:, 0, 0] == 1.0, drawn[:, 1, 0] == 7.5
    table = [[(kept & turned).sum(), (kept & ~turned).sum()], [(~kept & turned).sum(), (~kept & ~turned).sum()]]
    assert stats.chi2_contingency(table).pvalue > 1e-3  # tokens do not know of each other
