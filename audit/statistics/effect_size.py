"""Standardised effect d = mean / sd of paired differences: exact interval, power, and the pairs that would decide.

With n pairs of normal differences, d sqrt(n) follows the non-central t distribution with n - 1 degrees of freedom and
non-centrality delta sqrt(n), delta the true d. Everything here follows from that. The distribution is integrated here
because scipy 1.17's returns NaN in parts of its tails (df 4, t 11.18, nc -10.2) and takes 16 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

LARGEST_N = 10**9  # more pairs than this is said as "none would do"

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_NORMAL_REACH = 9.0  # beyond it a normal tail is below 1e-18
_CHI2_EXPONENT = 40.0  # bounds of a chi-squared variable that it leaves with probability below exp(-40) each


def cohen_d(diff_N: NDArray[np.float64]) -> float:
    """d_z = mean / sd (ddof 1) of the differences. NaN with fewer than 2 pairs or where all are equal."""
    if len(diff_N) < 2 or np.ptp(diff_N) == 0:
        return float("nan")
    return float(diff_N.mean() / diff_N.std(ddof=1))


def exact_interval(d: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the true d around an observed d of n pairs, by inversion of the non-central t distribution.

    Exact for independent normal differences; too narrow where pairs of one document are correlated. (NaN, NaN) with
    fewer than 2 pairs or where d is NaN.
    """
    if n < 2 or math.isnan(d):
        return float("nan"), float("nan")
    t, tail = d * math.sqrt(n), (1 - level) / 2
    step = 4 * math.sqrt(1 + t * t / (2 * (n - 1)))

    def noncentrality(p: float) -> float:
        return _root(lambda nc: noncentral_t_cdf(t, n - 1, nc) - p, t, step)

    return noncentrality(1 - tail) / math.sqrt(n), noncentrality(tail) / math.sqrt(n)


def power(d: float, n: int, alpha: float) -> float:
    """Probability that the two-sided paired t test of n pairs rejects at alpha, ``d`` being true; NaN if n < 2."""
    if n < 2:
        return float("nan")
    critical, nc = -float(special.stdtrit(n - 1, alpha / 2)), d * math.sqrt(n)
    return noncentral_t_cdf(-critical, n - 1, nc) + noncentral_t_cdf(-critical, n - 1, -nc)


def detectable_d(n: int, alpha: float, power: float = 0.8) -> float:
    """Smallest d > 0 that n pairs find with this power at alpha (two-sided paired t test); NaN if n < 2."""
    if n < 2:
        return float("nan")
    normal = float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) / math.sqrt(n)
    return _root(lambda d: power - _power(abs(d), n, alpha), normal, normal)


def needed_n(d: float, alpha: float, power: float = 0.8) -> int | None:
    """Fewest pairs that find a true d with this power at alpha; None where 10^9 do not, or d is 0 or NaN."""
    if d == 0 or math.isnan(d):
        return None
    return _fewest(lambda n: _power(d, n, alpha) >= power)


def equivalence_n(d: float, margin: float, alpha: float) -> int | None:
    """Fewest pairs with which the exact (1 - 2 alpha) interval around an observed d lies within +-margin.

    None where |d| >= margin or d is NaN (no number of pairs would do), or where 10^9 do not.
    """
    if math.isnan(d) or abs(d) >= margin:
        return None
    # The interval's end nearer to a margin is inside iff a true d at the margin gives the observed one, or a smaller
    # one, with probability alpha at most.
    return _fewest(lambda n: noncentral_t_cdf(abs(d) * math.sqrt(n), n - 1, margin * math.sqrt(n)) <= alpha)


def noncentral_t_cdf(t: float, df: float, nc: float) -> float:
    """P(T <= t) of the non-central t distribution, absolute error below 1e-10 for df from 1 to 10^9.

    T = (Z + nc) / S with S = sqrt(chi-squared(df) / df), so P(T <= t) is the mean of Phi(t S - nc). It is integrated
    over the values S = 1 + u where Phi is neither 0 nor 1; where Phi is 1 the probability of S itself is added.
    """
    if t < 0:
        return 1.0 - noncentral_t_cdf(-t, df, -nc)
    if t == 0:
        return float(special.ndtr(-nc))
    spread = 2 * math.sqrt(_CHI2_EXPONENT / df)  # Laurent and Massart 2000, lemma 1
    low = max(math.sqrt(max(0.0, 1 - spread)) - 1, (nc - t - _NORMAL_REACH) / t)
    saturated = (nc - t + _NORMAL_REACH) / t
    high = min(math.sqrt(1 + spread + spread**2 / 2) - 1, saturated)
    above = float(special.gammaincc(df / 2, df / 2 * max(1 + saturated, 0.0) ** 2))
    if high <= low:
        return above
    u = low + (high - low) * (_NODES + 1) / 2
    log_density = _log_scale(df / 2) + df / 2 * (2 * np.log1p(u) - 2 * u - u**2) - np.log1p(u)
    between = (high - low) / 2 * float((_WEIGHTS * np.exp(log_density) * special.ndtr(t * u + (t - nc))).sum())
    return min(1.0, above + between)


def _log_scale(a: float) -> float:
    """log(2 a^a exp(-a) / Gamma(a)), by Stirling's series where the terms would cancel."""
    if a < 50:
        return math.log(2) + a * math.log(a) - a - math.lgamma(a)
    return math.log(2) + math.log(a / (2 * math.pi)) / 2 - 1 / (12 * a) + 1 / (360 * a**3) - 1 / (1260 * a**5)


_power = power  # the functions above have an argument of that name


def _root(function: Callable[[float], float], centre: float, step: float) -> float:
    """Root of a falling function, looked for in ever wider brackets around ``centre``."""
    low, high = centre - step, centre + step
    while function(low) < 0:
        low -= step
        step *= 2
    while function(high) > 0:
        high += step
        step *= 2
    return float(optimize.brentq(function, low, high, xtol=1e-12))


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """Smallest n in 2 .. LARGEST_N for which a condition holds that, once it holds, goes on holding."""
    high = 2
    while not enough(high):
        if high == LARGEST_N:
            return None
        high = min(2 * high, LARGEST_N)
    low = max(high // 2, 1)  # not enough (or below the smallest n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
