"""Pooled lines against a plain loop, closed forms, and layers that share their tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from audit.statistics.cells import Pairs, Settings
from audit.statistics.pooled import (
    COLUMNS,
    LayerPairs,
    across_models,
    heterogeneity,
    pooled_row,
    pooled_table,
    stouffer,
)

SETTINGS = Settings(bootstrap_draws=500)
KEY = {"model": "m", "metric": "reap", "outcome": "kl", "intervention": "zero", "scope": "token", "label": "extended"}


def layer(diff: Any, token: Any, *, per_document: int = 4) -> LayerPairs:
    diff_N, token_N = np.asarray(diff, np.float64), np.asarray(token, np.int64)
    expert_N = np.zeros(len(diff_N), np.int64)
    made = Pairs(
        high_N=diff_N + 1,
        low_N=np.ones(len(diff_N)),
        document_N=token_N // per_document,
        expert_high_N=expert_N,
        expert_low_N=expert_N,
    )
    return LayerPairs(token_N=token_N, pairs=made)


def two_layers(seed: int = 0) -> tuple[dict[int, LayerPairs], pd.DataFrame]:
    """40 tokens; layer 0 has no pair at every fifth, layer 1 is 100 times larger and lists its tokens backwards."""
    rng = np.random.default_rng(seed)
    at_0 = np.array([t for t in range(40) if t % 5])
    at_1 = np.arange(40)[::-1]
    diff_0, diff_1 = rng.normal(0.5, 1, 32), 100 * rng.normal(0.2, 1, 40)
    long = pd.concat([pd.DataFrame({"t": at_0, "x": diff_0, "l": 0}), pd.DataFrame({"t": at_1, "x": diff_1, "l": 1})])
    return {1: layer(diff_1, at_1), 0: layer(diff_0, at_0)}, long


def test_a_pooled_line_equals_a_plain_loop_over_positions() -> None:
    layers, long = two_layers()
    row = pooled_row(layers, KEY, SETTINGS)
    sd = {number: np.std(part["x"], ddof=1) for number, part in long.groupby("l")}
    means = []
    for token in range(40):
        values = [x / sd[number] for t, x, number in long.to_numpy() if t == token]
        means.append(sum(values) / len(values))
    groups = np.arange(40) // 4
    ols = sm.OLS(means, np.ones(40)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert row["mean_d"] == pytest.approx(np.mean(means))
    assert row["p_t_cluster"] == pytest.approx(ols.pvalues[0])
    assert (row["layers"], row["positions"], row["positions_incomplete"], row["documents"]) == (2, 40, 8, 10)
    expected = stats.bootstrap(
        (np.arange(10),),
        lambda index: np.mean(np.reshape(means, (10, 4))[index]),
        n_resamples=4000,
        vectorized=False,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = expected.high - expected.low
    assert (row["mean_d_low"], row["mean_d_high"]) == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_a_layer_counted_twice_adds_no_evidence() -> None:
    """Layers share tokens: Stouffer over layers would make the p of two equal layers far smaller."""
    layers, _ = two_layers()
    single = pooled_row({0: layers[0]}, KEY, SETTINGS)
    double = pooled_row({0: layers[0], 1: layers[0]}, KEY, SETTINGS)
    assert double["p_t_cluster"] == pytest.approx(single["p_t_cluster"], rel=1e-12)
    assert double["mean_d"] == pytest.approx(single["mean_d"], rel=1e-12)
    assert (double["tau2"], double["i2"]) == (0.0, 0.0)
    assert single["tau2"] is None
    assert "tau2, i2: fewer than two layers" in single["notes"]


def test_the_order_of_pairs_and_layers_changes_no_bit() -> None:
    layers, _ = two_layers()
    rng = np.random.default_rng(2)
    shuffled = {}
    for number in (0, 1):
        pairs, token_N = layers[number].pairs, layers[number].token_N
        order = rng.permutation(len(token_N))
        moved = Pairs(**{name: getattr(pairs, name)[order] for name in pairs.__slots__})
        shuffled[number] = LayerPairs(token_N=token_N[order], pairs=moved)
    assert pooled_row(layers, KEY, SETTINGS) == pooled_row(shuffled, KEY, SETTINGS)


def test_layers_without_spread_and_values_that_are_not_finite_are_left_out_and_told() -> None:
    layers, _ = two_layers()
    broken = np.array([0.5, np.nan, -1.0, 2.0, np.inf, 0.1])
    layers |= {7: layer(np.full(6, 0.5), range(6)), 8: layer([1.0], [3]), 9: layer(broken, range(6))}
    row = pooled_row(layers, KEY, SETTINGS)
    assert (row["layers"], row["layers_left_out"]) == (3, 2)
    assert "layer 7 left out: all 6 differences are equal (0.5)" in row["notes"]
    assert "layer 8 left out: n too small" in row["notes"]
    assert row["positions_incomplete"] == 36 + 2  # layer 9 has four, of which layer 0 lacks 0 and 5
    nothing = pooled_row({7: layers[7]}, KEY, SETTINGS)
    assert (nothing["layers"], nothing["mean_d"]) == (0, None)
    assert "no layer has differences with a spread" in nothing["notes"]
    one_document = pooled_row({0: layer([1.0, 2.0, 4.0], range(3))}, KEY, SETTINGS)
    assert np.isnan([one_document["mean_d_low"], one_document["p_t_cluster"]]).all()
    assert "one document" in one_document["notes"]


def test_heterogeneity_is_that_of_dersimonian_and_laird() -> None:
    d_L, n_L = np.array([0.5, 0.1, -0.2, 0.3]), np.array([200, 180, 210, 50])
    expected = combine_effects(d_L, 1 / n_L + d_L**2 / (2 * n_L), method_re="dl")
    assert expected.q > 3
    assert heterogeneity(d_L, n_L) == pytest.approx((expected.tau2, expected.i2))
    assert heterogeneity(np.array([0.1, 0.1001]), np.array([50, 50])) == (0.0, 0.0)  # less than chance is none
    assert heterogeneity(np.zeros(3), np.full(3, 50)) == (0.0, 0.0)


def test_stouffer_equals_scipy_on_one_sided_p() -> None:
    p_M, sign_M = np.array([0.04, 0.3, 0.5]), np.array([0.2, 0.1, -0.4])
    one_sided = np.where(sign_M > 0, p_M / 2, 1 - p_M / 2)
    expected = stats.combine_pvalues(one_sided, method="stouffer")
    z, p = stouffer(p_M, sign_M)
    assert z == pytest.approx(expected.statistic)
    assert p == pytest.approx(2 * min(expected.pvalue, 1 - expected.pvalue))
    assert stouffer(np.array([0.03]), np.array([-1.0])) == pytest.approx((stats.norm.ppf(0.015), 0.03))
    assert np.isfinite(stouffer(np.array([0.0, 0.0]), np.array([1.0, -1.0]))).all()


def test_models_are_combined_layers_never() -> None:
    layers, _ = two_layers()
    other, _ = two_layers(seed=3)
    rows = [
        pooled_row(layers, KEY, SETTINGS),
        pooled_row(other, KEY | {"model": "n"}, SETTINGS),
        pooled_row({0: layer([1.0], [0])}, KEY | {"model": "o"}, SETTINGS),
        pooled_row(layers, KEY | {"metric": "ean"}, SETTINGS),
    ]
    table = pooled_table(rows[::-1])
    assert tuple(table.columns) == COLUMNS
    assert table[["model", "metric"]].to_numpy().tolist() == [["m", "ean"], ["m", "reap"], ["n", "reap"], ["o", "reap"]]
    combined = across_models(table).set_index("metric")
    p_M = np.array([rows[0]["p_t_cluster"], rows[1]["p_t_cluster"]])
    sign_M = np.sign([rows[0]["mean_d"], rows[1]["mean_d"]])
    z = (sign_M * stats.norm.ppf(1 - p_M / 2)).sum() / np.sqrt(2)
    assert combined.loc["reap", "z"] == pytest.approx(z)
    assert combined.loc["reap", "p_stouffer"] == pytest.approx(2 * (1 - stats.norm.cdf(abs(z))))
    assert combined.loc["reap", ["models", "notes"]].tolist() == [2, "without p_t_cluster: o"]
    assert pd.isna(combined.loc["ean", "z"])
    assert combined.loc["ean", "notes"] == "fewer than two models: nothing to combine"
