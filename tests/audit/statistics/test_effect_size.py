"""Effect size, interval and power against scipy, high-precision integration and simulation."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from audit.statistics import cohen_d, detectable_d, equivalence_n, exact_interval, needed_n, power
from audit.statistics.effect_size import noncentral_t_cdf


def integrated(t: float, df: int, nc: float) -> float:
    """P(T <= t) with 30 digits: the mean of Phi(t S - nc) over S = sqrt(chi-squared / df)."""
    with mpmath.workdps(30):
        a, sd = mpmath.mpf(df) / 2, 1 / mpmath.sqrt(2 * mpmath.mpf(df))
        scale = mpmath.log(2) + a * mpmath.log(a) - mpmath.loggamma(a)

        def density(s: mpmath.mpf) -> mpmath.mpf:
            return mpmath.exp(scale + (2 * a - 1) * mpmath.log(s) - a * s * s) * mpmath.ncdf(t * s - nc)

        points = sorted({max(mpmath.mpf(10) ** -20, 1 + k * sd) for k in (*range(-12, 13, 2), 18)})
        return float(mpmath.quad(density, points))


@pytest.mark.parametrize("d", [0.231, 5.0, -5.0])
@pytest.mark.parametrize("n", [2, 30, 101, 10**4, 10**6, 10**9])
def test_noncentral_t_to_ten_digits(n: int, d: float) -> None:
    t = d * math.sqrt(n)
    for shift in (-4, 0.5, 3):
        nc = t + shift * math.sqrt(1 + t * t / (2 * n))
        assert noncentral_t_cdf(t, n - 1, nc) == pytest.approx(integrated(t, n - 1, nc), abs=1e-10)


def test_noncentral_t_agrees_with_scipy_in_the_middle_and_in_the_tails() -> None:
    for df in (1, 4, 49, 50, 200, 5000):
        for t in (-6.0, -0.5, 0.0, 0.3, 4.0, 60.0):
            for nc in (-3.0, 0.0, 1.5, 8.0):
                expected = stats.nct.cdf(t, df, nc) if nc else stats.t.cdf(t, df)
                if not math.isnan(expected):
                    assert noncentral_t_cdf(t, df, nc) == pytest.approx(expected, abs=1e-8), (df, t, nc)


def test_d_is_the_t_statistic_over_the_root_of_n() -> None:
    diff = np.random.default_rng(0).normal(0.3, 2.0, 80)
    assert cohen_d(diff) == pytest.approx(stats.ttest_1samp(diff, 0).statistic / math.sqrt(80), rel=1e-12)
    assert math.isnan(cohen_d(np.full(7, 0.1)))
    assert math.isnan(cohen_d(np.array([0.4])))


def test_interval_of_the_published_effect() -> None:
    assert exact_interval(0.231, 200) == pytest.approx((0.090, 0.371), abs=5e-4)


@pytest.mark.parametrize(("d", "n", "level"), [(0.0, 5, 0.95), (0.4, 12, 0.9), (-1.2, 40, 0.995), (0.05, 3000, 0.9)])
def test_interval_ends_are_where_the_observed_d_is_a_tail(d: float, n: int, level: float) -> None:
    low, high = exact_interval(d, n, level)
    t, root = d * math.sqrt(n), math.sqrt(n)
    assert stats.nct.sf(t, n - 1, low * root) == pytest.approx((1 - level) / 2, abs=1e-8)
    assert stats.nct.cdf(t, n - 1, high * root) == pytest.approx((1 - level) / 2, abs=1e-8)


@pytest.mark.parametrize("d", [0.0, 0.1, -0.7, 5.0])
@pytest.mark.parametrize("n", [10**5, 10**6])
def test_interval_of_many_pairs_is_the_asymptotic_one(d: float, n: int) -> None:
    half = stats.norm.ppf(0.975) * math.sqrt((1 + d * d / 2) / n)
    assert exact_interval(d, n) == pytest.approx((d - half, d + half), abs=0.01 * half)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("d", [0.0, 5.0, -5.0])
def test_interval_of_few_pairs_holds_the_observed_d(d: float, n: int) -> None:
    low, high = exact_interval(d, n)
    assert low < d < high
    assert exact_interval(-d, n) == pytest.approx((-high, -low))


def test_no_interval_without_a_spread() -> None:
    assert all(math.isnan(end) for end in (*exact_interval(0.3, 1), *exact_interval(float("nan"), 50)))


@pytest.mark.parametrize(("d", "n", "alpha"), [(0.231, 200, 0.0025), (-0.3, 30, 0.05), (0.0, 12, 0.01), (2.0, 3, 0.05)])
def test_power_is_that_of_statsmodels(d: float, n: int, alpha: float) -> None:
    expected = TTestPower().power(abs(d), n, alpha, alternative="two-sided") if d else alpha
    assert power(d, n, alpha) == pytest.approx(expected, abs=1e-6)


def test_power_is_the_rate_of_rejections() -> None:
    repetitions = 4000
    diff = np.random.default_rng(1).normal(0.231, 1, (repetitions, 200))
    rate = (stats.ttest_1samp(diff, 0, axis=1).pvalue < 0.0025).mean()
    expected = power(0.231, 200, 0.0025)
    assert 0.55 < expected < 0.61
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / repetitions))


def test_needed_n_is_the_smallest_that_has_the_power() -> None:
    n = needed_n(0.2, 0.0025)
    assert n is not None
    assert abs(n - 380) <= 5
    for effect, alpha, target in ((0.2, 0.0025, 0.8), (-3.0, 0.05, 0.8), (0.01, 0.05, 0.9)):
        n = needed_n(effect, alpha, target)
        assert n is not None
        assert stats_power(effect, n, alpha) >= target > stats_power(effect, n - 1, alpha)
    assert needed_n(1e-6, 0.05) is None
    assert needed_n(0.0, 0.05) is None


def stats_power(d: float, n: int, alpha: float) -> float:
    critical, nc = stats.t.isf(alpha / 2, n - 1), abs(d) * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, nc) + stats.nct.cdf(-critical, n - 1, nc))


@pytest.mark.parametrize(("n", "alpha"), [(200, 0.0025), (20, 0.05), (10**6, 0.05)])
def test_detectable_d_has_the_power(n: int, alpha: float) -> None:
    assert stats_power(detectable_d(n, alpha), n, alpha) == pytest.approx(0.8, abs=1e-6)


def test_detectable_d_at_the_ends() -> None:
    assert detectable_d(200, 0.0025) == pytest.approx(0.28, abs=0.005)  # of the published audit
    assert power(detectable_d(2, 0.0025), 2, 0.0025) == pytest.approx(0.8, abs=1e-6)
    assert math.isnan(detectable_d(1, 0.05))
    assert math.isnan(power(0.2, 1, 0.05))


@pytest.mark.parametrize(("d", "alpha"), [(0.0, 0.05), (0.0, 0.0025), (0.03, 0.05), (-0.08, 0.05)])
def test_equivalence_n_is_the_smallest_whose_interval_fits(d: float, alpha: float) -> None:
    def fits(n: int) -> bool:
        low, high = exact_interval(d, n, 1 - 2 * alpha)
        return low >= -0.1 and high <= 0.1

    n = equivalence_n(d, 0.1, alpha)
    assert n is not None
    assert fits(n)
    assert not fits(n - 1)


def test_no_number_of_pairs_makes_a_large_effect_small() -> None:
    assert equivalence_n(0.1, 0.1, 0.05) is None
    assert equivalence_n(-0.4, 0.1, 0.05) is None
    assert equivalence_n(0.0999999, 0.1, 0.05) is None  # more than 10^9
