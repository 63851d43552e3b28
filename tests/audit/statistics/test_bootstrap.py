"""Bootstrap intervals against scipy's, plain loops over resampled documents and closed forms; odd data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from audit.statistics import bootstrap, cluster_intervals, cohen_d, mean_interval, pigeonhole_interval, superiority

Sample = tuple[np.ndarray, np.ndarray]


def skewed(documents: int, seed: int = 0) -> Sample:
    """Skewed differences with ties at 0, correlated within documents of 1 to 9 pairs, in no order."""
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), generator.integers(1, 10, documents))
    diff = generator.exponential(1, len(document)) - 0.8 + 0.4 * generator.normal(size=documents)[document]
    diff[generator.random(len(diff)) < 0.1] = 0.0
    order = generator.permutation(len(diff))
    return diff[order], document[order] * 3 - 7


def resampled(sample: Sample, statistic: object, draws: int, seed: int) -> np.ndarray:
    """The statistic of whole documents drawn with replacement, by a plain loop."""
    assert callable(statistic)
    diff, document = sample
    parts = [diff[document == number] for number in np.unique(document)]
    generator = np.random.default_rng(seed)
    choices = generator.integers(0, len(parts), (draws, len(parts)))
    return np.array([statistic(np.concatenate([parts[part] for part in choice])) for choice in choices])


@pytest.mark.parametrize("seed", range(3))
def test_bca_of_given_draws_is_that_of_scipy(seed: int) -> None:
    diff = np.random.default_rng(seed).exponential(1, 40) - 0.7

    def d(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return values.mean(axis=axis) / values.std(axis=axis, ddof=1)

    jackknife = np.array([d(np.delete(diff, index)) for index in range(len(diff))])
    for level in (0.9, 0.95, 0.999):
        expected = stats.bootstrap((diff,), d, n_resamples=3000, confidence_level=level, method="BCa", rng=seed)
        got = bootstrap._bca(expected.bootstrap_distribution, float(d(diff)), jackknife, levels=[level])[level]
        assert (got.low, got.high) == pytest.approx(tuple(expected.confidence_interval), rel=1e-9)


@pytest.mark.parametrize(("name", "statistic"), [("d", cohen_d), ("superiority", superiority)])
def test_documents_are_resampled_whole(name: str, statistic: object) -> None:
    assert callable(statistic)
    sample = skewed(40)
    draws = 10_000
    drawn = resampled(sample, statistic, draws, seed=5)
    diff, document = sample
    jackknife = np.array([statistic(diff[document != number]) for number in np.unique(document)])
    expected = bootstrap._bca(drawn, float(statistic(diff)), jackknife, levels=[0.9, 0.95])
    got = cluster_intervals(*sample, levels=[0.9, 0.95], draws=draws, seed=1)[name]
    for level in (0.9, 0.95):
        z = stats.norm.isf((1 - level) / 2)
        # Monte-Carlo error of a quantile, twice (both sides are drawn), in units of the bootstrap's own sd.
        error = math.sqrt(2 * (1 - level**2) / 4 / draws) / stats.norm.pdf(z) * drawn.std()
        assert got[level].low == pytest.approx(expected[level].low, abs=5 * error)
        assert got[level].high == pytest.approx(expected[level].high, abs=5 * error)
        assert got[level].reason == ""


def test_mean_of_many_documents_has_the_cluster_robust_error() -> None:
    generator = np.random.default_rng(2)
    document = np.repeat(np.arange(800), 5)
    value = generator.normal(size=800)[document] + generator.normal(size=4000) + 50.0
    sums = np.bincount(document, weights=value - value.mean())
    half = stats.norm.ppf(0.975) * math.sqrt((sums**2).sum()) / len(value)
    got = mean_interval(value, document, level=0.95, draws=10_000, seed=0)
    assert (got.low, got.high) == pytest.approx((value.mean() - half, value.mean() + half), abs=0.06 * half)


def test_a_seed_gives_one_result_whatever_the_threads() -> None:
    program = (
        "import json, numpy as np; from audit.statistics import *\n"
        "g = np.random.default_rng(0); x = g.normal(size=3000); c = g.integers(0, 900, 3000)\n"
        "h = g.integers(-1, 8, 3000); l = g.integers(8, 16, 3000)\n"
        "i = cluster_intervals(x, c, levels=[.95], draws=500, seed=3)\n"
        "p = pigeonhole_interval(x, c, h, l, level=.95, draws=500, seed=3)\n"
        "print(json.dumps([j.low.hex() for j in (i['d'][.95], i['superiority'][.95], p)]))"
    )
    outputs = []
    for threads in ("1", "4"):
        counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        run = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **counts}, capture_output=True, text=True, check=True
        )
        outputs.append(json.loads(run.stdout))
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 3


def test_chunks_of_draws_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = skewed(30)
    whole = cluster_intervals(*sample, levels=[0.9], draws=1000, seed=4)["d"][0.9]
    other = cluster_intervals(*sample, levels=[0.9], draws=1000, seed=5)["d"][0.9]
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 8 * 30 * 7)
    parts = cluster_intervals(*sample, levels=[0.9], draws=1000, seed=4)["d"][0.9]
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert parts.low != other.low


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_d_does_not_depend_on_the_unit(scale: float) -> None:
    diff, document = skewed(25)
    expected = cluster_intervals(diff, document, levels=[0.95], draws=2000, seed=0)
    got = cluster_intervals(diff * scale, document, levels=[0.95], draws=2000, seed=0)
    for name in ("d", "superiority"):
        assert got[name][0.95].low == pytest.approx(expected[name][0.95].low, rel=1e-9)
        assert got[name][0.95].high == pytest.approx(expected[name][0.95].high, rel=1e-9)


def test_a_spread_far_below_the_mean_keeps_its_digits() -> None:
    diff, document = skewed(25)
    mean, spread = 1e7, diff - diff.mean()
    got = cluster_intervals(mean + spread, document, levels=[0.95], draws=2000, seed=0)["d"][0.95]
    sd = 1e7 / resampled((mean + spread, document), cohen_d, 2000, seed=1)  # sd of each draw
    low, high = np.quantile(sd, [0.001, 0.999])
    assert low < 1e7 / got.high < 1e7 / got.low < high


@pytest.mark.parametrize(
    ("diff", "document", "d_says", "superiority_is"),
    [
        ([], [], "no pairs", None),
        ([0.3, 0.1, -0.2], [4, 4, 4], "one document", None),
        ([0.0] * 6, [0, 0, 1, 1, 2, 2], "all differences are equal", 0.5),
        ([0.1] * 6, [0, 0, 1, 1, 2, 2], "all differences are equal", 1.0),
        ([0.5, -0.5], [0, 1], "draws held no differences that vary", None),
        ([7.0] + [0.0] * 99, list(range(100)), "too few documents differ", None),
    ],
)
def test_what_cannot_be_given_is_said(
    diff: list[float], document: list[int], d_says: str, superiority_is: float | None
) -> None:
    got = cluster_intervals(np.array(diff), np.array(document, dtype=int), levels=[0.9, 0.95], draws=500, seed=0)
    for level in (0.9, 0.95):
        assert math.isnan(got["d"][level].low)
        assert math.isnan(got["d"][level].high)
        assert d_says in got["d"][level].reason
        ends = got["superiority"][level]
        if superiority_is is not None:
            assert (ends.low, ends.high) == (superiority_is, superiority_is)
            assert ends.reason == "every draw gives the same value"
        elif len(set(document)) < 2:
            assert math.isnan(ends.low)
            assert d_says in ends.reason
        else:
            assert ends.low <= superiority(np.array(diff)) <= ends.high


@pytest.mark.parametrize("seed", range(40))
def test_tiny_samples_give_an_interval_or_a_reason(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 7))
    diff, document = generator.integers(-2, 3, n) * 10.0 ** generator.integers(-9, 9), generator.integers(0, 4, n)
    draws = int(generator.choice([1, 3, 400]))
    both = cluster_intervals(diff, document, levels=[0.5, 0.9999], draws=draws, seed=seed)
    high, low = generator.integers(-1, 2, n), generator.integers(-1, 3, n)
    intervals = [interval for by_level in both.values() for interval in by_level.values()]
    intervals.append(pigeonhole_interval(diff, document, high, low, level=0.9, draws=draws, seed=seed))
    intervals.append(mean_interval(diff, document, level=0.9, draws=draws, seed=seed))
    for interval in intervals:
        assert interval.reason or interval.low <= interval.high
        assert interval.reason or draws > 1  # one draw has no spread
        assert math.isnan(interval.low) == math.isnan(interval.high)


def test_a_skewness_beyond_bca_is_said() -> None:
    jackknife = np.append(np.zeros(400), 1.0)  # acceleration nearly -1/6, as far as it can go
    draws = np.random.default_rng(0).normal(size=1000)
    got = bootstrap._bca(draws, -10.0, jackknife, levels=[0.5, 0.9999])  # estimate below all draws: bias -3.3
    assert got[0.9999].low == draws.min()
    assert "most extreme draw" in got[0.9999].reason
    assert got[0.5].reason == ""


def test_two_way_draws_multiply_the_weights_of_document_and_experts() -> None:
    diff, document = skewed(30, seed=3)
    generator = np.random.default_rng(8)
    high, low = generator.integers(-1, 6, len(diff)), generator.integers(-1, 9, len(diff))
    draws = 4000
    d = []
    numbers, experts = np.unique(document), np.setdiff1d(np.union1d(high, low), [-1])
    for _ in range(draws):
        of_document = dict(zip(numbers, generator.multinomial(30, [1 / 30] * 30), strict=True))
        of_expert = dict(
            zip(experts, generator.multinomial(len(experts), [1 / len(experts)] * len(experts)), strict=True)
        )
        of_expert[-1] = 1
        weight = [of_document[g] * of_expert[h] * of_expert[e] for g, h, e in zip(document, high, low, strict=True)]
        values = np.repeat(diff, weight)
        d.append(values.mean() / values.std(ddof=1))
    got = pigeonhole_interval(diff, document, high, low, level=0.9, draws=draws, seed=0)
    error = math.sqrt(2 * 0.05 * 0.95 / draws) / stats.norm.pdf(stats.norm.isf(0.05)) * np.std(d)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(d, [0.05, 0.95])), abs=5 * error)
    assert got.reason == ""


def test_draws_without_weight_are_left_out_and_counted() -> None:
    diff, document = skewed(30)
    high, low = np.zeros(len(diff), int), np.ones(len(diff), int)  # weights (1, 1) in half of the draws, else 0
    got = pigeonhole_interval(diff, document, high, low, level=0.9, draws=4000, seed=0)
    dropped = int(got.reason.split(" of 4000 draws")[0])
    assert dropped == pytest.approx(2000, abs=4 * math.sqrt(1000))
    one_way = np.quantile(resampled((diff, document), cohen_d, 4000, seed=1), [0.05, 0.95])
    assert (got.low, got.high) == pytest.approx(tuple(one_way), abs=0.05)


def test_tied_ends_alone_leave_the_documents() -> None:
    diff, document = skewed(30)
    tied = np.full(len(diff), -1)
    got = pigeonhole_interval(diff, document, tied, tied, level=0.9, draws=4000, seed=0)
    assert "only documents were resampled" in got.reason
    one_way = np.quantile(resampled((diff, document), cohen_d, 4000, seed=1), [0.05, 0.95])
    assert (got.low, got.high) == pytest.approx(tuple(one_way), abs=0.04)


def test_two_way_memory_is_bounded() -> None:
    generator = np.random.default_rng(0)
    n = 5000
    diff, document = generator.normal(size=n), generator.integers(0, 500, n)
    high, low = generator.integers(0, 64, (2, n))
    tracemalloc.start()
    pigeonhole_interval(diff, document, high, low, level=0.9, draws=2000, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * max(bootstrap.CHUNK_BYTES, 8 * n) + 40 * 8 * n
