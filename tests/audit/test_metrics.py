"""Every metric against a plain loop over tokens."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from audit.observations import (
    ALIASES,
    METRICS,
    Observations,
    coactivation,
    find_metric,
    metrics,
    super_experts,
    unified,
    weight_statistics,
)

DOMAINS = ("code", "prose", "math")
LAYER = 3


@dataclass
class Tokens:
    """Random clean tokens; expert 0 is active for none, expert 1 for exactly one."""

    domain: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    experts: int

    def observe(self) -> Observations:
        observations = Observations(DOMAINS, self.experts)
        observations.add(
            LAYER,
            domain_N=self.domain,
            index_NK=self.index,
            weight_NK=self.weight,
            output_NKD=self.output,
            hidden_before_ND=self.before,
            hidden_after_ND=self.after,
        )
        return observations


def random_tokens(tokens: int, top_k: int, hidden: int, experts: int, seed: int, ties: bool) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([2 + torch.randperm(experts - 2, generator=generator)[:top_k] for _ in range(tokens)])
    index[tokens // 2, 0] = 1
    weight = torch.rand(tokens, top_k, generator=generator) ** 3
    if ties:
        weight = (weight * 4).round() / 4  # many equal weights, many exact zeros
    output = torch.randn(tokens, top_k, hidden, generator=generator) * (1 + index[:, :, None]) + 0.5
    before = torch.randn(tokens, hidden, generator=generator)
    after = before + (weight[:, :, None] * output).sum(1) / 10
    domain = torch.randint(len(DOMAINS), (tokens,), generator=generator)
    return Tokens(domain, index, weight, output, before, after, experts)


def plain_loop(tokens: Tokens, domain: int | None) -> dict[str, list[float]]:
    """The definitions, token by token, in Python floats."""
    routed: dict[int, list[tuple[float, list[float], float]]] = defaultdict(list)
    total = 0
    for t in range(len(tokens.index)):
        if domain is not None and int(tokens.domain[t]) != domain:
            continue
        total += 1
        before, after = tokens.before[t].tolist(), tokens.after[t].tolist()
        cosine = math.fsum(a * b for a, b in zip(before, after, strict=True)) / (
            math.hypot(*before) * math.hypot(*after)
        )
        for slot, expert in enumerate(tokens.index[t].tolist()):
            output = tokens.output[t, slot].tolist()
            routed[expert].append((float(tokens.weight[t, slot]), output, max(0.0, 1 - cosine)))

    values: dict[str, list[float]] = defaultdict(list)
    for expert in range(tokens.experts):
        rows = routed[expert]
        n = len(rows)
        g = [row[0] for row in rows]
        norm = [math.hypot(*row[1]) for row in rows]
        sum_g = math.fsum(g)
        variances = (
            [statistics.variance(column) for column in zip(*(row[1] for row in rows), strict=True)] if n > 1 else []
        )
        differences = math.fsum(abs(a - b) for a in g for b in g)
        values["utilization"].append(n / total)
        values["mean_routing_weight"].append(sum_g / n if n else math.nan)
        values["activation_norm"].append(statistics.fmean(norm) if n else math.nan)
        values["activation_std"].append(statistics.stdev(norm) if n > 1 else math.nan)
        values["gate_sum"].append(sum_g)
        values["ean"].append(math.fsum(norm))
        values["reap"].append(math.fsum(a * b for a, b in zip(g, norm, strict=True)) / n if n else math.nan)
        values["msan"].append(math.fsum(b * b for b in norm) / n if n else math.nan)
        values["easy_ep"].append(math.fsum(row[0] * b * row[2] for row, b in zip(rows, norm, strict=True)))
        values["mone_fusion"].append(math.sqrt(math.fsum(variances)) * sum_g / n if n > 1 else math.nan)
        values["activation_max"].append(max((abs(x) for row in rows for x in row[1]), default=math.nan))
        values["routing_weight_std"].append(statistics.stdev(g) if n > 1 else math.nan)
        values["routing_entropy"].append(float(stats.entropy(g)) if sum_g else math.nan)
        values["routing_gini"].append(differences / (2 * n * sum_g) if sum_g else math.nan)
    return values


SIZES = [(60, 2, 3, 5, 0, False), (60, 2, 3, 5, 1, True), (90, 4, 7, 12, 0, True), (90, 4, 7, 12, 1, False)]


@pytest.mark.parametrize("domain", [None, *DOMAINS])
@pytest.mark.parametrize("size", SIZES)
def test_metrics_equal_a_plain_loop_over_tokens(size: tuple[int, int, int, int, int, bool], domain: str | None) -> None:
    tokens = random_tokens(*size)
    expected = plain_loop(tokens, None if domain is None else DOMAINS.index(domain))
    table = metrics(tokens.observe(), domain=domain)
    assert set(table["metric"]) == set(expected)
    for metric, rows in table.groupby("metric"):
        assert list(rows["expert"]) == list(range(tokens.experts))
        error = (rows["value"] - expected[metric]).abs()
        assert (rows["value"].isna() == np.isnan(expected[metric])).all(), metric
        bound = 1e-9 * np.maximum(1, np.abs(expected[metric]))
        assert (error.dropna() <= (bound + rows["error_bound"])[error.notna()]).all(), metric


def test_an_expert_without_a_token_has_zero_sums_and_no_means() -> None:
    table = metrics(random_tokens(60, 2, 3, 5, 0, False).observe()).set_index(["expert", "metric"])
    assert table.loc[0, "n"].eq(0).all()
    assert table.loc[1, "n"].eq(1).all()
    zero = {"utilization", "gate_sum", "ean", "easy_ep"}
    values = table["value"].loc[0]
    assert (values[list(zero)] == 0).all()
    assert values.drop(list(zero)).isna().all()
    assert set(table["value"].loc[1][lambda x: x.isna()].index) == {
        "activation_std",
        "mone_fusion",
        "routing_weight_std",
    }


def test_easy_ep_counts_only_tokens_whose_stream_turns() -> None:
    """cos = 1, 0, -1, and a zero stream, whose cosine is read as 0: weights 0, 1, 2, 1 of g ||E|| = 0.5 * 5."""
    after = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    tokens = Tokens(
        torch.zeros(4, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), 0.5),
        torch.tensor([3.0, -4.0]).expand(4, 1, 2), before, after, experts=1,
    )  # fmt: skip
    assert metrics(tokens.observe()).set_index("metric").loc["easy_ep", "value"] == 10.0


def exact_gini(g: np.ndarray) -> float:
    """Sorted form, O(n log n)."""
    g = np.sort(g)
    return float(((2 * np.arange(1, len(g) + 1) - len(g) - 1) * g).sum() / (len(g) * g.sum()))


WEIGHTS = {
    "uniform": lambda rng: rng.random(4000),
    "small": lambda rng: rng.gamma(0.5, 1e-4, 4000),
    "scaled": lambda rng: 16 * rng.beta(0.3, 3, 4000),
    "equal": lambda rng: np.full(4000, 0.123),
    "one of many": lambda rng: np.r_[np.full(3999, 1e-9), 0.9],
    "zeros": lambda rng: np.r_[np.zeros(3000), rng.random(1000)],
    "odd number": lambda rng: rng.random(7),
    "below the first bin": lambda rng: rng.random(500) * 1e-9,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_gini_is_within_its_bound(name: str) -> None:
    g = np.asarray(WEIGHTS[name](np.random.default_rng(5)))
    n = len(g)
    tokens = Tokens(
        torch.zeros(n, dtype=torch.long), torch.zeros(n, 1, dtype=torch.long), torch.from_numpy(g)[:, None],
        torch.ones(n, 1, 2), torch.ones(n, 2), torch.ones(n, 2), experts=1,
    )  # fmt: skip
    row = metrics(tokens.observe()).set_index("metric").loc["routing_gini"]
    error = abs(row["value"] - exact_gini(g))
    assert error <= row["error_bound"] + 1e-12
    if name != "below the first bin":
        assert row["error_bound"] <= 1 / 256 + 2**-25 / g.mean()


def test_unified_generates_the_named_metrics() -> None:
    tokens = random_tokens(90, 4, 7, 12, 2, False)
    observations = tokens.observe()
    table = metrics(observations).set_index(["metric", "expert"])["value"]
    counts = torch.bincount(tokens.index.flatten(), minlength=12).numpy()
    np.testing.assert_array_equal(unified(observations, 0, 0, 0)["value"], counts)
    named = {
        "gate_sum": (0, 1, 0),
        "ean": (0, 0, 1),
        "reap": (1, 1, 1),
        "activation_norm": (1, 0, 1),
        "msan": (1, 0, 2),
    }
    for name, exponents in named.items():
        np.testing.assert_array_equal(unified(observations, *exponents)["value"], table[name])
    g, norm = tokens.weight.double(), tokens.output.double().norm(dim=-1)
    by_hand = [float((g**2 * norm)[tokens.index == e].sum()) / max(1, counts[e]) ** 0.5 for e in range(1, 12)]
    np.testing.assert_allclose(unified(observations, 0.5, 2, 1)["value"][1:], by_hand)
    with pytest.raises(ValueError, match=r"unified\.beta: 3"):
        unified(observations, 0, 1, 3)


def test_one_quantity_has_one_name() -> None:
    assert {alias: find_metric(alias).name for alias in ALIASES} == {
        "frequency": "utilization",
        "man": "activation_norm",
        "seer": "gate_sum",
    }
    assert not set(ALIASES) & set(METRICS)
    published = [name for name, metric in METRICS.items() if metric.label == "published"]
    assert published == ["utilization", "mean_routing_weight", "activation_norm", "activation_std"]
    claims = {name: metric.orientation for name, metric in METRICS.items() if metric.orientation != 1}
    assert claims == {"routing_weight_std": 0, "routing_entropy": 0, "routing_gini": 0, "aimer": -1}
    with pytest.raises(ValueError, match="'popularity' is unknown"):
        find_metric("popularity")


def test_coactivation_counts_pairs_of_active_experts() -> None:
    tokens = random_tokens(60, 3, 3, 6, 3, False)
    observations = tokens.observe()
    for domain in (None, *DOMAINS):
        expected = np.zeros((6, 6), dtype=int)
        for t, active in enumerate(tokens.index.tolist()):
            if domain in (None, DOMAINS[tokens.domain[t]]):
                for a in active:
                    for b in active:
                        expected[a, b] += 1
        np.testing.assert_array_equal(coactivation(observations, LAYER, domain), expected)
    with pytest.raises(ValueError, match="layer: 9 was not observed"):
        coactivation(observations, 9)
    with pytest.raises(ValueError, match="domain: 'law' is unknown"):
        coactivation(observations, LAYER, "law")


def observe_maxima(*maxima_of_layers: torch.Tensor) -> Observations:
    """One token per expert, whose output has this largest entry."""
    experts = len(maxima_of_layers[0])
    observations = Observations(["prose"], experts)
    for layer, maxima in enumerate(maxima_of_layers):
        observations.add(
            layer,
            domain_N=torch.zeros(experts, dtype=torch.long),
            index_NK=torch.arange(experts)[:, None],
            weight_NK=torch.ones(experts, 1),
            output_NKD=-maxima[:, None, None],
            hidden_before_ND=torch.ones(experts, 1),
            hidden_after_ND=torch.ones(experts, 1),
        )
    return observations


def test_super_experts_are_extreme_and_early() -> None:
    """Of 400 experts in four layers two stand out, one of them in the last quarter."""
    outlier = torch.ones(100)
    outlier[17] = 50.0
    table = super_experts(observe_maxima(torch.ones(100), outlier, torch.ones(100), outlier), total_layers=4)
    assert table.loc[table["super_expert"], ["layer", "expert"]].to_numpy().tolist() == [[1, 17]]
    assert len(table) == 400


def test_super_experts_stand_above_a_tenth_of_the_largest() -> None:
    """Four of 1,000 are above the 99.5 % quantile, three of them above a tenth of the largest."""
    maxima = torch.ones(1000)
    maxima[:4] = torch.tensor([100.0, 90.0, 9.0, 11.0])
    table = super_experts(observe_maxima(maxima), total_layers=2)
    assert table["expert"][table["super_expert"]].tolist() == [0, 1, 3]


def test_weight_statistics_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(3, 4, generator=generator)
    experts = [(torch.randn(2, 4, generator=generator), torch.randn(4, 5, generator=generator)) for _ in range(3)]
    table = weight_statistics(LAYER, router, iter(experts))
    for expert, row in table.iterrows():
        entries = [x for w in experts[int(str(expert))] for x in w.flatten().tolist()]
        assert row["router_row_norm"] == pytest.approx(math.hypot(*router[int(str(expert))].tolist()), rel=1e-12)
        assert row["expert_weight_norm"] == pytest.approx(math.hypot(*entries), rel=1e-12)
        rms = math.hypot(*entries) / math.sqrt(len(entries))
        assert row["aimer"] == pytest.approx(statistics.fmean(map(abs, entries)) / rms, rel=1e-12)
    with pytest.raises(ValueError, match="layer 3 has weights of 2 experts"):
        weight_statistics(LAYER, router, experts[:2])


def test_weight_metrics_join_the_table() -> None:
    tokens = random_tokens(60, 2, 3, 5, 0, False)
    weights = pd.DataFrame(
        {
            "layer": LAYER,
            "expert": [4, 3, 2, 1, 0],
            "router_row_norm": 1.0,
            "expert_weight_norm": 2.0,
            "aimer": range(5),
        }
    )
    table = metrics(tokens.observe(), weights)
    assert set(table["metric"]) == set(METRICS)
    aimer = table[table["metric"] == "aimer"]
    assert aimer["value"].tolist() == [4, 3, 2, 1, 0]
    assert aimer["orientation"].eq(-1).all()
    with pytest.raises(ValueError, match="layer 3 has 4 rows"):
        metrics(tokens.observe(), weights[:4])
