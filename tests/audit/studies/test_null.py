"""Permutation tests: the same numbers as a plain loop, and the error rates they promise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from made_effects import made_effects, plain_pairs
from scipy import stats

from audit.studies.active_experts import ActiveExperts, active_experts
from audit.studies.ends import ends, shuffled_rankings, shuffled_within_tokens, standardized
from audit.studies.null import Null, NullRankings

OUTCOMES = ("delta_loss", "kl")


def nulls(active: ActiveExperts, rankings: int, seed: int = 0) -> NullRankings:
    effect_NKO = np.stack([active.outcomes[name] for name in OUTCOMES], axis=-1)
    return NullRankings(active, effect_NKO, rankings, lambda purpose: np.random.default_rng([seed, len(purpose)]))


def plain_d(rows: pd.DataFrame, score: pd.Series, outcome: str) -> float:
    pairs, _ = plain_pairs(rows, score, outcome)
    kept = pairs[np.isfinite(pairs["effect_high"] - pairs["effect_low"])]
    return float(stats.ttest_rel(kept["effect_high"], kept["effect_low"]).statistic / np.sqrt(len(kept)))


def test_p_of_a_metric_is_that_of_a_plain_loop_over_the_same_permutations() -> None:
    rows = made_effects(0, tokens=60, active=3, experts=8, strength=0.5)
    rows.loc[[4, 40], "kl"] = np.inf
    value_E = np.array([2.0, 1.0, 1.0, np.nan, 4.0, 3.0, 1.0, 0.0])  # ties, and an expert that is not ranked
    found = nulls(active_experts(rows), 60).over_experts(value_E)
    expert = rows["expert"]
    start = np.array([0.0, 1.0, 1.0, np.nan, 1.0, 2.0, 3.0, 4.0])  # the same ties and the same unranked expert
    for o, outcome in enumerate(OUTCOMES):
        permuted = [plain_d(rows, expert.map(dict(enumerate(ranking))), outcome) for ranking in _same(start, 60)]
        np.testing.assert_allclose(found.d_RO[:, o], permuted, rtol=1e-9)
        d = plain_d(rows, expert.map(dict(enumerate(value_E))), outcome)
        assert found.p(d, o) == (1 + sum(abs(other) >= abs(d) for other in permuted)) / 61


def _same(start: np.ndarray, rankings: int) -> Iterator[np.ndarray]:
    return shuffled_rankings(start, rankings, np.random.default_rng([0, len("over experts")]))


def test_p_of_a_token_level_predictor_is_that_of_a_plain_loop_over_the_same_permutations() -> None:
    rows = made_effects(1, tokens=40, active=3).sort_values(["sequence", "position", "expert"], ignore_index=True)
    rows["routing_weight"] = rows["routing_weight"].round(1)  # ties
    rows.loc[[1, 30, 31, 32], "routing_weight"] = np.nan
    active = active_experts(rows)
    score_NK = active.predictors["routing_weight"]
    found = nulls(active, 40).within_tokens(score_NK)
    drawn = shuffled_within_tokens(score_NK, 40, np.random.default_rng([0, len("within tokens")]))
    scores = [pd.Series(shuffled_NK.ravel()) for shuffled_NK in drawn]  # rows and arrays are in the same order here
    for o, outcome in enumerate(OUTCOMES):
        permuted = [plain_d(rows, score, outcome) for score in scores]
        np.testing.assert_allclose(found.d_RO[:, o], permuted, rtol=1e-9)
        d = plain_d(rows, rows["routing_weight"], outcome)
        assert found.p(d, o) == (1 + sum(abs(other) >= abs(d) for other in permuted)) / 41


def test_the_ranking_itself_and_its_reverse_count_as_at_least_as_large() -> None:
    """With two experts there is nothing but the ranking and its reverse: p is 1 whatever the effects are."""
    rows = made_effects(2, tokens=50, active=2, experts=2, strength=3.0)
    active = active_experts(rows)
    found = nulls(active, 99).over_experts(np.array([0.3, 0.7]))
    d = plain_d(rows, rows["expert"].astype(float), "delta_loss")
    assert abs(d) > 0.3
    assert found.p(d, 0) == 1.0


def test_it_does_not_matter_which_candidate_comes_first() -> None:
    active = active_experts(made_effects(3))
    rng = np.random.default_rng(0)
    one_E, other_E, tied_E = rng.random(12), rng.random(12), rng.integers(0, 3, 12).astype(float)
    weight_NK, norm_NK = active.predictors["routing_weight"], active.predictors["contribution_norm"]
    first, second = nulls(active, 30), nulls(active, 30)
    for ours, theirs in (
        (first.over_experts(one_E), second.over_experts(other_E)),
        (first.within_tokens(weight_NK), second.within_tokens(norm_NK)),
    ):
        np.testing.assert_array_equal(ours.d_RO, theirs.d_RO)
    assert first.over_experts(other_E) is first.over_experts(one_E)
    assert first.within_tokens(norm_NK) is first.within_tokens(weight_NK)
    assert (first.over_experts(tied_E).d_RO != first.over_experts(one_E).d_RO).any()
    assert (first.within_tokens(weight_NK.round(1)).d_RO != first.within_tokens(weight_NK).d_RO).any()


def test_what_does_not_exist_has_no_p_and_counts_in_none() -> None:
    null = Null(np.array([[0.5], [np.nan], [-0.9], [0.1]]), np.array([[10], [1], [10], [10]]))
    assert null.p(np.nan, 0) is None
    assert null.p(-0.5, 0) == 3 / 4
    share, error, rankings = null.rejection_rate(0) or (0.0, 0.0, 0)
    expected = [2 * stats.t.sf(abs(d) * np.sqrt(10), 9) < 0.05 for d in (0.5, -0.9, 0.1)]
    assert (share, rankings) == (np.mean(expected), 3)
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 3))
    alone = active_experts(made_effects(4, active=1))
    assert nulls(alone, 5).over_experts(np.arange(12.0)).rejection_rate(0) is None


def test_the_rejection_rate_is_that_of_scipys_paired_t() -> None:
    rows = made_effects(5, tokens=60, active=3, experts=6, strength=1.0)
    found = nulls(active_experts(rows), 50).over_experts(np.arange(6.0))
    rejected = []
    for ranking in _same(np.arange(1.0, 7.0), 50):
        pairs, _ = plain_pairs(rows, rows["expert"].map(dict(enumerate(ranking))), "kl")
        rejected.append(stats.ttest_rel(pairs["effect_high"], pairs["effect_low"]).pvalue < 0.05)
    share, _, rankings = found.rejection_rate(1) or (0.0, 0.0, 0)
    assert (share, rankings) == (np.mean(rejected), 50)
    assert 0 < share < 1


def _simulated(layers: int, metrics: int, strength: float) -> dict[str, np.ndarray]:
    """p values of metrics that know nothing, at layers whose experts differ; and rejection rates of random tokens."""
    found: dict[str, list[float]] = {"permutation": [], "naive": [], "token": []}
    for layer in range(layers):
        rng = np.random.default_rng([layer, 99])
        active = active_experts(made_effects(layer, tokens=150, active=4, experts=16, strength=strength))
        effect_NKO = active.outcomes["kl"][..., None]
        null = NullRankings(active, effect_NKO, 499, lambda purpose, layer=layer: np.random.default_rng([layer, 5]))
        unknowing = null.over_experts(rng.random(16))
        for _ in range(metrics):
            paired = ends(active.scores(rng.random(16)))
            d_O, pairs_O = standardized(*paired.effects(effect_NKO), paired.paired_N)
            found["permutation"].append(unknowing.p(float(d_O[0]), 0) or 0.0)
            found["naive"].append(float(2 * stats.t.sf(abs(d_O[0]) * np.sqrt(pairs_O[0]), pairs_O[0] - 1)))
        share, _, _ = null.within_tokens(rng.random(active.expert_NK.shape)).rejection_rate(0) or (1.0, 0.0, 0)
        found["token"].append(share)
    return {name: np.array(values) for name, values in found.items()}


def check_error_rates(layers: int, metrics: int) -> None:
    """Within three Monte-Carlo standard errors, of the metrics and of the 499 permutations each layer shares."""
    p = _simulated(layers, metrics, strength=0.6)
    error = np.sqrt(0.05 * 0.95 * (1 / (layers * metrics) + 1 / (layers * 499)))
    assert (p["permutation"] <= 0.05).mean() <= 0.05 + 3 * error
    assert stats.kstest(p["permutation"], "uniform").pvalue > 1e-3
    assert (p["naive"] < 0.05).mean() > 0.15  # an arbitrary ranking of experts that differ is often significant
    assert abs(p["token"].mean() - 0.05) <= 3 * np.sqrt(0.05 * 0.95 / (layers * 499))


def test_arbitrary_rankings_look_significant_to_t_but_not_to_the_permutation_test() -> None:
    check_error_rates(layers=8, metrics=40)


@pytest.mark.full
def test_error_rates_over_many_layers() -> None:
    check_error_rates(layers=60, metrics=40)
