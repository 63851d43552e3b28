"""Cells: every statistic against scipy and statsmodels, families, and data that must be told, not crashed on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from audit.statistics.cells import CELL, COLUMNS, Pairs, Settings, cell_row, cell_table

SETTINGS = Settings(bootstrap_draws=300)


def key(**changes: Any) -> dict[str, Any]:
    base = {"model": "m", "layer": 0, "metric": "reap", "outcome": "kl", "intervention": "zero", "scope": "token"}
    return base | {"label": "extended", "orientation": 1} | changes


def pairs(high: Any, low: Any = None, *, per_document: int = 5, experts: int = 6, seed: int = 0) -> Pairs:
    high_N = np.asarray(high, np.float64)
    rng = np.random.default_rng(seed)
    return Pairs(
        high_N=high_N,
        low_N=np.zeros(len(high_N)) if low is None else np.asarray(low, np.float64),
        document_N=np.arange(len(high_N)) // per_document,
        expert_high_N=rng.integers(0, experts, len(high_N)),
        expert_low_N=rng.integers(0, experts, len(high_N)),
    )


def normal_pairs(d: float, n: int = 400, seed: int = 0, document_sd: float = 0.3) -> Pairs:
    rng = np.random.default_rng(seed)
    low_N = rng.normal(size=n)
    shared_N = np.repeat(rng.normal(size=n // 5 + 1) * document_sd, 5)[:n]
    return pairs(low_N + d + shared_N + rng.normal(size=n), low_N, seed=seed)


def one(made: Pairs, settings: Settings = SETTINGS, **arguments: Any) -> pd.Series[Any]:
    return cell_table([cell_row(made, key(), settings, **arguments)], settings).iloc[0]


def test_every_statistic_equals_scipy_and_statsmodels() -> None:
    made = normal_pairs(0.2)
    diff_N = made.high_N - made.low_N
    row = cell_row(made, key(), SETTINGS, ties=7, p_permutation=0.02, noise_floor=1e-6)
    ols = sm.OLS(diff_N, np.ones(400)).fit(cov_type="cluster", cov_kwds={"groups": made.document_N}, use_t=True)
    scores = sm.OLS(np.sign(diff_N) / 2, np.ones(400)).fit(
        cov_type="cluster", cov_kwds={"groups": made.document_N}, use_t=True
    )
    expected = {
        "n": 400,
        "documents": 80,
        "experts_high": 6,
        "ties": 7,
        "dropped_nonfinite": 0,
        "mean_diff": diff_N.mean(),
        "median_diff": np.median(diff_N),
        "sd_diff": np.std(diff_N, ddof=1),
        "median_abs_effect": np.median(np.abs(np.concatenate([made.high_N, made.low_N]))),
        "share_positive": np.mean(diff_N > 0),
        "superiority": stats.mannwhitneyu(diff_N, [0.0]).statistic / 400,
        "cohen_d": diff_N.mean() / np.std(diff_N, ddof=1),
        "p_t": stats.ttest_rel(made.high_N, made.low_N).pvalue,
        "p_t_cluster": ols.pvalues[0],
        "p_wilcoxon": stats.wilcoxon(made.high_N, made.low_N).pvalue,
        "p_sign": stats.binomtest(int((diff_N > 0).sum()), 400).pvalue,
        "p_superiority": scores.pvalues[0],
        "p_permutation": 0.02,
        "noise_floor": 1e-6,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    t, df = row["cohen_d"] * 20, 399
    assert stats.nct.cdf(t, df, row["d_low"] * 20) == pytest.approx(0.975, abs=1e-6)
    assert stats.nct.cdf(t, df, row["d_high"] * 20) == pytest.approx(0.025, abs=1e-6)
    assert row["reason"] == ""
    assert row["notes"] == ""


def test_intervals_by_document_equal_an_independent_bca_within_its_monte_carlo_error() -> None:
    """scipy's BCa over documents of equal size; the ends of 20,000 draws scatter by far less than a tenth."""
    made = normal_pairs(0.3, n=300, document_sd=0.7)
    diff_N = made.high_N - made.low_N
    row = cell_row(made, key(), Settings(bootstrap_draws=20_000))

    def cohen(index: Any) -> Any:
        drawn = np.take(diff_N.reshape(60, 5), index, axis=0).reshape(-1)
        return drawn.mean() / drawn.std(ddof=1)

    expected = stats.bootstrap(
        (np.arange(60),), cohen, n_resamples=4000, vectorized=False, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    width = expected.high - expected.low
    assert (row["d_boot_low"], row["d_boot_high"]) == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    assert row["d_boot_low"] < row["d_boot90_low"] < row["d_boot90_high"] < row["d_boot_high"]
    assert row["superiority_low"] < row["superiority90_low"] < row["superiority"] < row["superiority90_high"]
    assert row["d_boot_high"] - row["d_boot_low"] > 1.2 * (row["d_high"] - row["d_low"])  # documents differ


def test_rows_do_not_depend_on_the_order_of_pairs_nor_on_other_cells() -> None:
    made = normal_pairs(0.2)
    order = np.random.default_rng(3).permutation(400)
    shuffled = Pairs(**{name: getattr(made, name)[order] for name in made.__slots__})
    assert cell_row(made, key(), SETTINGS) == cell_row(shuffled, key(), SETTINGS)
    other = cell_row(made, key(layer=1), SETTINGS)
    assert other["d_boot_low"] != cell_row(made, key(), SETTINGS)["d_boot_low"]  # draws of its own
    assert cell_row(made, key(), Settings(bootstrap_draws=300, seed=1))["d_boot_low"] != other["d_boot_low"]


def test_the_table_does_not_depend_on_the_order_of_rows() -> None:
    rows = [cell_row(normal_pairs(0.1 * i, seed=i), key(layer=i, metric=m), SETTINGS) for i in range(3) for m in "ba"]
    first, second = cell_table(rows, SETTINGS), cell_table(rows[::-1], SETTINGS)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert tuple(first.columns) == COLUMNS
    assert first[["layer", "metric"]].to_numpy().tolist() == [[i, m] for i in range(3) for m in "ab"]


def test_corrections_stay_within_families() -> None:
    rows = [
        cell_row(normal_pairs(0.05 * layer, seed=layer), key(layer=layer, outcome=outcome, label=label), SETTINGS)
        for layer in range(4)
        for outcome, label in [("kl", "published"), ("kl", "control"), ("tv", "published"), ("delta_loss", "extended")]
    ]
    for number, row in enumerate(rows):
        row["metric"] = f"{row['label']}{number % 4}"
    rows[0] = cell_row(pairs([1.0]), key(metric="published0", label="published"), SETTINGS)  # without a p
    table = cell_table(rows, SETTINGS)
    for (outcome, label), family in table.groupby(["outcome", "label"]):
        known = family["p_t"].notna()
        assert known.sum() == (3 if (outcome, label) == ("kl", "published") else 4)
        assert (family["family_size"] == known.sum()).all()
        assert (family["alpha_corrected"] == 0.05 / known.sum()).all()
        for test in ("p_t", "p_t_cluster", "p_wilcoxon"):
            for name, method in (("bonferroni", "bonferroni"), ("holm", "holm"), ("bh", "fdr_bh")):
                expected = multipletests(family.loc[known, test], method=method)[1]
                assert family.loc[known, f"{test}_{name}"].tolist() == pytest.approx(expected.tolist())
        assert family.loc[~known, "p_t_holm"].isna().all()
    confirmatory = table[table["outcome"].isin(["kl", "delta_loss"]) & (table["label"] != "control")]
    known = confirmatory["p_t"].notna()
    expected = multipletests(confirmatory.loc[known, "p_t"], method="holm")[1]
    assert confirmatory.loc[known, "p_holm_confirmatory"].tolist() == pytest.approx(expected.tolist())
    assert table.drop(confirmatory.index)["p_holm_confirmatory"].isna().all()


@pytest.mark.parametrize(
    ("d", "n", "word"), [(0.8, 400, "predicts"), (-0.8, 400, "reversed"), (0.0, 8000, "practically null")]
)
def test_verdicts_of_data_with_a_known_truth(d: float, n: int, word: str) -> None:
    row = one(normal_pairs(d, n, document_sd=0.0), p_permutation=0.001, noise_floor=1e-9)
    assert row["verdict"] == word
    assert row["dual_test"] == (word == "predicts")
    assert row["equivalence"] == (word == "practically null")


def test_power_columns_equal_an_independent_calculation() -> None:
    row = one(normal_pairs(0.1, 200))
    power = TTestPower()
    assert row["mde_80"] == pytest.approx(power.solve_power(nobs=200, alpha=0.05, power=0.8), rel=1e-4)
    needed = power.solve_power(effect_size=abs(row["cohen_d"]), alpha=0.05, power=0.8)
    assert row["n_needed_80"] == pytest.approx(needed, abs=1)


def test_equivalence_uses_the_corrected_alpha_and_the_uncorrected_one_beside_it() -> None:
    """20 cells: 1 - 2 * .0025 is wider than 90 %, so a cell may be null at .05 each and not at the family's alpha."""
    made = normal_pairs(0.0, 600, seed=4, document_sd=0.0)
    diff_N = made.high_N - made.low_N
    diff_N = (diff_N - diff_N.mean()) / diff_N.std(ddof=1)  # d is 0 exactly: the interval is +-z / sqrt(n)
    made = Pairs(**{name: getattr(made, name) for name in made.__slots__} | {"high_N": diff_N, "low_N": 0 * diff_N})
    others = [cell_row(normal_pairs(0.1, 50, seed=i), key(layer=i), SETTINGS) for i in range(1, 20)]
    settings = Settings(bootstrap_draws=300, superiority_margin=0.2)
    row = cell_table([cell_row(made, key(), settings), *others], settings).iloc[0]
    half = stats.norm.isf(0.0025) / math.sqrt(600)
    assert (row["equivalence_low"], row["equivalence_high"]) == pytest.approx((-half, half), rel=0.01)
    assert half > 0.1
    assert not row["equivalence"]
    assert row["equivalence_uncorrected"]
    assert row["verdict"] == "undecided"


def test_ends_of_several_tied_experts_count_as_no_expert() -> None:
    made = pairs(np.arange(10.0), experts=1)
    made.expert_high_N[:5] = -1
    row = cell_row(made, key(), SETTINGS)
    assert (row["experts_high"], row["experts_low"]) == (1, 1)


@pytest.mark.parametrize(
    ("made", "arguments", "words", "known"),
    [
        (pairs([]), {}, "n too small for a standard deviation: no pairs", []),
        (pairs([]), {"ties": 9}, "at 9 tokens all active experts tied, or there was one alone", []),
        (pairs([1.0]), {}, "n too small for a standard deviation: 1 pair", ["mean_diff", "p_sign"]),
        (pairs(np.zeros(50)), {}, "all 50 differences are 0", ["superiority", "mean_diff"]),
        (pairs(np.full(50, 0.3), np.full(50, 0.2)), {}, "all 50 differences are equal (0.1)", ["p_wilcoxon", "p_sign"]),
        # 0.3 - 0.2 and 0.8 - 0.7 differ by rounding alone
        (pairs([0.3, 0.8] * 20, [0.2, 0.7] * 20), {}, "all 40 differences are equal (0.1)", ["p_sign"]),
        (pairs(np.arange(40.0), per_document=40), {}, "one document only", ["cohen_d", "p_t", "d_low", "mde_80"]),
        (pairs([np.nan, np.inf, 1.0]), {}, "n too small for a standard deviation: 1 pair", ["mean_diff"]),
        (pairs([np.inf], [np.inf]), {}, "no pairs", []),
    ],
)
def test_what_cannot_be_estimated_is_null_and_says_why(
    made: Pairs, arguments: dict[str, Any], words: str, known: list[str]
) -> None:
    row = one(made, **arguments)
    assert row["verdict"] == "not estimable"
    assert words in row["reason"]
    assert row[known].notna().all()
    if "cohen_d" not in known:
        assert row[["cohen_d", "p_t", "d_low", "equivalence_low", "mde_80", "n_needed_80"]].isna().all()
    assert row[["d_boot_low", "p_t_cluster", "dual_test", "equivalence"]].isna().sum() >= 3


@pytest.mark.parametrize(
    "made",
    [
        pairs([1.0, 2.0]),
        pairs([1.0, 2.0], per_document=1),
        pairs([1.0, 2.0, 4.0, 1.0], per_document=2),
        pairs([0.0] * 99 + [1.0], per_document=1),
        pairs([1e200, -1e200, 3e200, 1e199] * 10),
        pairs([5e-324, 0.0, 1e-323, 0.0] * 10),
        pairs(np.random.default_rng(0).standard_cauchy(60)),
        pairs(100 + 1e-3 * np.random.default_rng(0).normal(size=60)),
        pairs(np.random.default_rng(0).integers(-1, 2, 60).astype(float)),
        pairs([1.0, 2.0] * 5 + [np.nan] * 5, per_document=2),
        pairs([1.0, -1.0] * 20, per_document=2),
        pairs(np.arange(1.0, 41.0), experts=1),
    ],
)
@pytest.mark.filterwarnings("error")
def test_odd_data_give_a_verdict_and_no_null_without_a_reason(made: Pairs) -> None:
    row = one(made)
    told = f"{row['reason']}; {row['notes']}"
    assert row["verdict"] in ("predicts", "reversed", "practically null", "undecided", "not estimable")
    for name in ("d_boot_low", "d_pigeonhole_low", "superiority_low", "p_superiority", "p_permutation", "noise_floor"):
        assert pd.notna(row[name]) or name.removesuffix("_low") in told or row["verdict"] == "not estimable", name
    if row["verdict"] != "not estimable":
        shown = ["cohen_d", "d_low", "d_boot_low", "p_t", "p_t_cluster", "p_wilcoxon", "dual_test", "equivalence"]
        assert row[shown].notna().all()
        assert row["d_low"] <= row["cohen_d"] <= row["d_high"]


def test_the_unit_of_the_outcome_does_not_matter() -> None:
    made = normal_pairs(0.3)
    tiny = Pairs(**{n: getattr(made, n) * (1e-150 if n in ("high_N", "low_N") else 1) for n in made.__slots__})
    first, second = cell_row(made, key(), SETTINGS), cell_row(tiny, key(), SETTINGS)
    assert second["sd_diff"] == pytest.approx(first["sd_diff"] * 1e-150, rel=1e-12)
    for name in ("cohen_d", "d_boot_low", "d_pigeonhole_high", "p_t", "p_t_cluster", "p_wilcoxon"):
        assert second[name] == pytest.approx(first[name], rel=1e-6), name


def test_pairs_that_are_not_finite_are_dropped_counted_and_noted() -> None:
    made = normal_pairs(0.3)
    made.high_N[:3] = np.nan
    made.low_N[3:5] = -np.inf
    row = cell_row(made, key(), SETTINGS)
    assert (row["n"], row["dropped_nonfinite"]) == (395, 5)
    assert "5 pairs with an effect that is not finite were dropped" in row["notes"]
    assert row["mean_diff"] == pytest.approx((made.high_N - made.low_N)[5:].mean())


def test_few_documents_are_noted() -> None:
    assert "29 documents" in cell_row(normal_pairs(0.3, 145), key(), SETTINGS)["notes"]
    assert "documents" not in cell_row(normal_pairs(0.3, 150), key(), SETTINGS)["notes"]


def test_effects_below_the_noise_floor_are_not_judged() -> None:
    made = normal_pairs(0.8)
    middle = float(np.median(np.abs(np.concatenate([made.high_N, made.low_N]))))
    assert one(made, noise_floor=middle * 1.01)["verdict"] == "below noise floor"
    assert one(made, noise_floor=middle * 0.99)["verdict"] == "predicts"


def test_columns_of_a_caller_stand_last() -> None:
    table = cell_table([cell_row(normal_pairs(0.3), key(), SETTINGS) | {"spearman": 0.1, "kendall": 0.2}], SETTINGS)
    assert tuple(table.columns) == (*COLUMNS, "kendall", "spearman")


def test_no_rows_give_an_empty_table_and_a_cell_twice_is_refused() -> None:
    empty = cell_table([], SETTINGS)
    assert tuple(empty.columns) == COLUMNS
    assert len(empty) == 0
    row = cell_row(pairs([1.0, 2.0]), key(), SETTINGS)
    with pytest.raises(ValueError, match=r"the cell \('m', 0, 'reap', 'kl', 'zero', 'token'\) occurs twice"):
        cell_table([row, row | {"label": "control"}], SETTINGS)
    assert CELL == ("model", "layer", "metric", "outcome", "intervention", "scope")


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.5},
        {"alpha": float("nan")},
        {"margin": 0.0},
        {"margin": math.inf},
        {"superiority_margin": 0.5},
        {"bootstrap_draws": 99},
        {"seed": -1},
        {"confirmatory": ()},
    ],
)
def test_settings_refuse_what_cannot_be_used_and_name_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: .* cannot be used; it takes"):
        Settings(**wrong)


@pytest.mark.full
def test_a_metric_that_knows_nothing_is_seldom_said_to_predict_in_any_cell_of_its_family() -> None:
    """300 families of 8 null cells whose documents resemble themselves; family-wise rate at most .05 + 3 se."""
    rows = [
        cell_row(
            normal_pairs(0.0, seed=8 * family + layer, document_sd=0.7), key(model=str(family), layer=layer), SETTINGS
        )
        for family in range(300)
        for layer in range(8)
    ]
    table = cell_table(rows, SETTINGS)
    wrong = table["verdict"].isin(["predicts", "reversed"]).groupby(table["model"]).any().mean()
    naive = (table["p_t"] < table["alpha_corrected"]).groupby(table["model"]).any().mean()
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert naive > 0.1  # the data are such that a test blind to documents fails
