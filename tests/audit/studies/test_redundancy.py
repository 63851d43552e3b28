"""The redundancy study on tables whose truth is known: values by hand, verdicts and coverage by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from statsmodels.stats.multitest import multipletests

from audit.studies.redundancy import RedundancySettings, RedundancyTables, redundancy_tables

DRAWS = 199


def _table(kl: dict[tuple[str, str, int | None], np.ndarray], tokens: np.ndarray, where: str = "layer 0") -> pa.Table:
    """A pruning table from the mean KL per document of every pruning; the loss rises by half the KL from 3 nats."""
    frames = [
        pd.DataFrame(
            {
                "criterion": criterion,
                "order": order,
                "draw": pd.array([draw] * len(tokens), "Int32"),
                "share": 0.25,
                "where": where,
                "document": np.arange(len(tokens)),
                "tokens": tokens,
                "loss_sum": np.where(tokens > 0, tokens * (3 + value / 2), 0),
                "baseline_loss_sum": tokens * 3.0,
                "kl_sum": np.where(tokens > 0, tokens * value, 0),
            }
        )
        for (criterion, order, draw), value in kl.items()
    ]
    return pa.Table.from_pandas(pd.concat(frames), preserve_index=False)


def _simulated(
    seed: int, documents: int, metric_means: list[float], noise: float = 0.3, draws: int = DRAWS
) -> pa.Table:
    """Metrics of given true mean KL, random draws of mean 1; a document shifts all its prunings, each has noise."""
    rng = np.random.default_rng(seed)
    level = rng.lognormal(-0.125, 0.5, documents)  # mean 1
    tokens = rng.integers(50, 150, documents)

    def one(mean: float) -> np.ndarray:
        return level * mean * rng.lognormal(-(noise**2) / 2, noise, documents)

    kl: dict[tuple[str, str, int | None], np.ndarray] = {
        (f"m{i}", "metric", None): one(mean) for i, mean in enumerate(metric_means)
    }
    kl |= {("random", "random", draw): one(1.0) for draw in range(draws)}
    return _table(kl, tokens)


def _verdict(tables: RedundancyTables) -> pd.Series:
    assert len(tables.verdicts) == 1
    return tables.verdicts.iloc[0]


FAST = RedundancySettings(bootstrap_draws=400)


def test_values_intervals_and_p_by_hand() -> None:
    rng = np.random.default_rng(0)
    documents, draws = 12, 9
    tokens = rng.integers(5, 40, documents)
    kl = {("a", "metric", None): rng.gamma(2, 0.1, documents), ("a", "reverse", None): rng.gamma(2, 0.9, documents)}
    kl |= {("b", "metric", None): rng.gamma(2, 0.2, documents), ("c", "metric", None): rng.gamma(2, 5.0, documents)}
    random = rng.gamma(2, 0.2, (draws, documents))
    random[0] = kl["b", "metric", None]  # a tie counts as at least as good
    tables = redundancy_tables(
        _table(kl | {("random", "random", d): random[d] for d in range(draws)}, tokens),  # type: ignore[arg-type]
        RedundancySettings(bootstrap_draws=4000),
    )
    rows = tables.criteria.set_index(["outcome", "criterion", "order"])
    means = {name: float((tokens * v).sum() / tokens.sum()) for (name, order, _), v in kl.items() if order == "metric"}
    of_random = (random * tokens).sum(1) / tokens.sum()
    p = [(1 + sum(r <= means[name] for r in of_random)) / 10 for name in "abc"]
    assert p[2] == 1
    for outcome in ("kl", "perplexity"):  # the loss rises with the KL, so both have the same p
        assert [rows.loc[(outcome, name, "metric"), "p"] for name in "abc"] == pytest.approx(p)
        assert [rows.loc[(outcome, name, "metric"), "p_holm"] for name in "abc"] == pytest.approx(
            multipletests(p, method="holm")[1]
        )
        assert math.isnan(rows.loc[(outcome, "a", "reverse"), "p"])
        assert "not tested" in rows.loc[(outcome, "a", "reverse"), "reason"]
    for name in "abc":
        row = rows.loc[("kl", name, "metric")]
        assert row["value"] == pytest.approx(means[name], rel=1e-12)
        assert rows.loc[("perplexity", name, "metric"), "value"] == pytest.approx(math.exp(3 + means[name] / 2))
        # A ratio of sums: the delta method's standard error, one document at a time.
        residual = tokens * (kl[name, "metric", None] - means[name])
        error = math.sqrt((residual**2).sum()) / tokens.sum()
        assert (row["high"] - row["low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)
    assert rows.loc[("kl", "random", "random"), "value"] == pytest.approx(of_random.mean())
    assert rows.loc[("perplexity", "random", "random"), "value"] == pytest.approx(np.exp(3 + of_random / 2).mean())
    baseline = tables.criteria.groupby("outcome")["baseline"].unique()
    assert baseline["perplexity"] == pytest.approx([math.exp(3)])
    assert baseline["kl"].tolist() == [0]

    verdict = _verdict(tables)
    assert (verdict["best"], verdict["worst"]) == ("a", "c")
    assert verdict["spread"] == pytest.approx((means["c"] - means["a"]) / of_random.mean())
    assert verdict["descriptive"]
    assert "9 random draws, fewer than 199: descriptive" in verdict["reason"]


def test_the_interval_is_that_of_all_pairs() -> None:
    """Both ends by plain loops over bootstrap draws and pairs of metrics."""
    table = _simulated(1, 25, [1.0, 1.1, 0.9, 1.05], draws=10)
    settings = RedundancySettings(bootstrap_draws=300, seed=5)
    frame = table.to_pandas()
    wide = frame.assign(draw=frame["draw"].fillna(-1)).pivot(
        index=["criterion", "draw"], columns="document", values="kl_sum"
    )
    tokens = frame.groupby("document")["tokens"].first().to_numpy()
    metrics = [wide.loc[(f"m{i}", -1)].to_numpy() for i in range(4)]
    random = wide.loc["random"].to_numpy()
    weights = np.random.default_rng(5).multinomial(25, [1 / 25] * 25, 300)

    def units(weight: np.ndarray) -> list[float]:
        scale = np.mean([(weight * r).sum() for r in random]) / (weight * tokens).sum()
        return [float((weight * m).sum() / (weight * tokens).sum() / scale) for m in metrics]

    estimate, drawn = units(np.ones(25)), [units(w) for w in weights]
    pairs = list(itertools.permutations(range(4), 2))
    high = max(np.quantile([d[i] - d[j] for d in drawn], 0.95) for i, j in pairs)
    largest = [max((d[i] - d[j]) - (estimate[i] - estimate[j]) for i, j in pairs) for d in drawn]
    low = max(estimate) - min(estimate) - np.quantile(largest, 0.95)
    verdict = _verdict(redundancy_tables(table, settings))
    assert verdict["high"] == pytest.approx(high, rel=1e-10)
    assert verdict["low"] == pytest.approx(max(low, 0), rel=1e-10)
    assert verdict["verdict"] == "undecided"


def test_metrics_that_remove_alike_are_interchangeable() -> None:
    rng = np.random.default_rng(2)
    kl = {(f"m{i}", "metric", None): np.full(30, 0.5) for i in range(4)}
    kl |= {("random", "random", d): rng.gamma(2, 0.3, 30) for d in range(DRAWS)}  # type: ignore[misc]
    verdict = _verdict(redundancy_tables(_table(kl, np.full(30, 20)), FAST))  # type: ignore[arg-type]
    assert (verdict["verdict"], verdict["spread"], verdict["low"], verdict["high"]) == ("interchangeable", 0, 0, 0)
    assert not verdict["descriptive"]
    assert verdict["reason"] == ""


@pytest.mark.parametrize(
    ("documents", "means", "expected"),
    [
        (1500, [1.0] * 6, "interchangeable"),  # equal in truth, different in every document
        (100, [0.6, 0.8, 1.0, 1.2], "criteria differ"),
        (10, [1.0] * 6, "undecided"),  # too few documents to claim either
    ],
)
def test_verdicts_follow_the_truth(documents: int, means: list[float], expected: str) -> None:
    found = [
        _verdict(redundancy_tables(_simulated(seed, documents, means, draws=20), FAST))["verdict"] for seed in range(20)
    ]
    assert found.count(expected) >= 18


# The truth lies on the margin, and several metrics are there to be chosen from: a naive interval around the worst and
# the best of the sample, which are farther apart than the truth, would claim a difference far more often than 5 %.
ON_THE_MARGIN = [0.95, 0.95, 1.0, 1.0, 1.05, 1.05]


def _shares(repetitions: int, documents: int, means: list[float]) -> dict[str, float]:
    """How often each verdict is given."""
    found = [
        _verdict(redundancy_tables(_simulated(1000 + seed, documents, means, draws=20), FAST))["verdict"]
        for seed in range(repetitions)
    ]
    return {name: found.count(name) / repetitions for name in ("interchangeable", "criteria differ", "undecided")}


def test_a_spread_at_the_margin_is_rarely_claimed_to_be_either() -> None:
    shares = _shares(60, 60, ON_THE_MARGIN)
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)  # three standard errors of a share of 60
    assert shares["interchangeable"] <= bound
    assert shares["criteria differ"] <= bound


@pytest.mark.full
@pytest.mark.parametrize("means", [ON_THE_MARGIN, [0.95, 1.05], [0.95, *[1.0] * 10, 1.05]], ids=len)
@pytest.mark.parametrize("documents", [40, 150])
def test_error_rates_at_the_margin(documents: int, means: list[float]) -> None:
    shares = _shares(500, documents, means)
    print(f"{documents} documents, {len(means)} metrics: {shares}")
    bound = 0.06 + 3 * math.sqrt(0.06 * 0.94 / 500)  # a percentile bootstrap of 40 skewed documents is a little narrow
    assert shares["interchangeable"] <= bound
    assert shares["criteria differ"] <= bound


def test_what_is_not_estimable_says_why() -> None:
    rng, tokens = np.random.default_rng(3), np.full(6, 10)
    metric = {(f"m{i}", "metric", None): rng.gamma(2, 1, 6) for i in range(2)}
    random = {("random", "random", d): rng.gamma(2, 1, 6) for d in range(3)}
    still = {key: np.zeros(6) for key in random}
    broken = {("m0", "metric", None): np.array([1, 2, np.nan, 1, 1, 1.0])}
    for kl, count, reason in [
        ({**dict([next(iter(metric.items()))]), **random}, tokens, "1 metrics: there is nothing to compare"),
        (metric, tokens, "no random draws to compare with"),
        (metric | still, tokens, "random prunings change nothing"),
        (metric | random | broken, tokens, "the sums of some documents are not finite"),
        (metric | random, np.array([10, 0, 0, 0, 0, 0]), "1 documents with a token to predict"),
        (metric | random, np.zeros(6, int), "0 documents with a token to predict"),
    ]:
        verdict = _verdict(redundancy_tables(_table(kl, count), FAST))  # type: ignore[arg-type]
        assert verdict["verdict"] == "not estimable"
        assert verdict["reason"].startswith(reason)
    tables = redundancy_tables(_table(metric | random, np.array([10, 10, 10, 0, 0, 0])), FAST)  # type: ignore[arg-type]
    assert "3 documents without a token to predict left out" in _verdict(tables)["reason"]
    assert _verdict(tables)["verdict"] != "not estimable"


def test_every_missing_value_has_a_reason() -> None:
    rng = np.random.default_rng(4)
    kl = {("m0", "metric", None): np.array([1.0, np.nan]), ("m1", "metric", None): rng.gamma(2, 1, 2)}
    for tokens in (np.array([5, 5]), np.array([5, 0]), np.array([0, 0])):
        for random in ({}, {("random", "random", 0): rng.gamma(2, 1, 2)}):
            criteria = redundancy_tables(_table(kl | random, tokens), FAST).criteria  # type: ignore[arg-type]
            missing = criteria[["value", "low", "high", "p"]].isna().any(axis=1)
            assert (criteria.loc[missing, "reason"] != "").all()


def test_prunings_of_a_cell_must_be_of_the_same_tokens() -> None:
    table = _simulated(0, 5, [1.0, 1.0], draws=2)
    with pytest.raises(
        ValueError, match=r"every pruning of layer 0, share 0\.25 needs one row for each of 5 documents"
    ):
        redundancy_tables(table.slice(1), FAST)
    other = table.to_pandas()
    other.loc[0, "tokens"] += 1
    with pytest.raises(ValueError, match=r"prunings of layer 0, share 0\.25 were measured on different tokens"):
        redundancy_tables(pa.Table.from_pandas(other), FAST)


def test_every_cell_has_its_verdict() -> None:
    a, b = (_simulated(s, 8, [1.0, 1.3], draws=2) for s in (1, 2))
    b = b.set_column(
        b.column_names.index("where"), "where", pa.array(["all layers"] * len(b), b.schema.field("where").type)
    )
    both, alone = redundancy_tables(pa.concat_tables([a, b]), FAST), redundancy_tables(b, FAST)
    assert both.verdicts["where"].tolist() == ["layer 0", "all layers"]
    pd.testing.assert_series_equal(both.verdicts.iloc[1], alone.verdicts.iloc[0], check_names=False)
