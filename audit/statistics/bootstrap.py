"""Bootstrap intervals that resample documents, because tokens of one document are not independent.

A draw gives every document a whole weight: how often it came when G documents were drawn from the G. All statistics
here are functions of sums over pairs, so a draw is the weighted sum of the documents' sums.

Shapes: N pairs, G documents (clusters), B draws, S sums, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special

from audit.statistics.paired import superiority_scores

CHUNK_BYTES = 1 << 22  # working set of a chunk of draws; larger ones leave the cache and are slower
UNDEFINED_SHARE = 0.01  # an interval of d is not given where more of the draws have no spread

ONE_DOCUMENT = "one document: there is nothing to resample"
NO_PAIRS = "no pairs"
ALL_EQUAL = "all differences are equal: d has no value"
EQUAL_DRAWS = "every draw gives the same value"
EXTREME_DRAW = "the skewness exceeds what BCa corrects: an end is the most extreme draw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An interval and what must be said about it; its ends are NaN only with a reason."""

    low: float
    high: float
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.reason or self.low <= self.high, self


def cluster_intervals(
    diff_N: NDArray[np.float64],
    cluster_N: NDArray[np.int64],
    *,
    levels: Sequence[float],
    draws: int,
    seed: int,
) -> dict[str, dict[float, Interval]]:
    """BCa intervals, by document, of ``"d"`` (mean / sd) and ``"superiority"``, at each level.

    Bias correction from the draws, acceleration from leaving out one document at a time (Efron 1987, as in
    ``scipy.stats.bootstrap``). With few documents (below about 30) they are too narrow; ``benchmarks/coverage.py``.
    """
    assert len(diff_N) == len(cluster_N)
    count_G, index_N = _documents(cluster_N)
    if len(count_G) < 2:
        return {name: _unknown(levels, ONE_DOCUMENT if len(count_G) else NO_PAIRS) for name in ("d", "superiority")}
    centred_N, centre = _standardised(diff_N)
    columns = (np.ones(len(diff_N)), superiority_scores(diff_N), centred_N, centred_N**2)
    sums_GS = np.array([np.bincount(index_N, weights=column) for column in columns], dtype=np.float64).T
    sums_BS = np.concatenate(list(_weighted_sums(sums_GS, draws, seed)))
    jackknife_GS = sums_GS.sum(axis=0) - sums_GS

    def bca(statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> dict[float, Interval]:
        return _bca(statistic(sums_BS), float(statistic(sums_GS.sum(axis=0))), statistic(jackknife_GS), levels=levels)

    superiority = bca(_mean_of_sums)
    if np.ptp(diff_N) == 0:
        return {"d": _unknown(levels, ALL_EQUAL), "superiority": superiority}
    return {"d": bca(partial(_d_of_sums, centre=centre)), "superiority": superiority}


def mean_interval(
    value_N: NDArray[np.float64], cluster_N: NDArray[np.int64], *, level: float, draws: int, seed: int
) -> Interval:
    """BCa interval, by document, of the mean of all values (documents weigh by their number of values)."""
    assert len(value_N) == len(cluster_N)
    count_G, index_N = _documents(cluster_N)
    if len(count_G) < 2:
        return _unknown([level], ONE_DOCUMENT if len(count_G) else NO_PAIRS)[level]
    sums_GS = np.stack([count_G, np.bincount(index_N, weights=value_N)], axis=1)
    sums_BS = np.concatenate(list(_weighted_sums(sums_GS, draws, seed)))
    jackknife_GS = sums_GS.sum(axis=0) - sums_GS
    mean = float(_mean_of_sums(sums_GS.sum(axis=0)))
    return _bca(_mean_of_sums(sums_BS), mean, _mean_of_sums(jackknife_GS), levels=[level])[level]


def pigeonhole_interval(
    diff_N: NDArray[np.float64],
    cluster_N: NDArray[np.int64],
    high_N: NDArray[np.int64],
    low_N: NDArray[np.int64],
    *,
    level: float,
    draws: int,
    seed: int,
) -> Interval:
    """Percentile interval of d when documents and the layer's experts are both a sample (Owen 2007, 0712.1111).

    Weight of a pair = weight of its document x of its high-ranked x of its low-ranked expert; every draw has one
    weight per document and one per expert seen on either side. Expert -1 stands for several tied experts: weight 1.
    Draws in which no pair has weight, or those that have do not differ, are left out and counted in the reason.
    Memory: the inputs, and for a chunk of draws at most ``max(CHUNK_BYTES, 8 N)`` bytes, three times over.
    """
    assert len(diff_N) == len(cluster_N) == len(high_N) == len(low_N)
    count_G, document_N = _documents(cluster_N)
    if len(count_G) < 2:
        return _unknown([level], ONE_DOCUMENT if len(count_G) else NO_PAIRS)[level]
    if np.ptp(diff_N) == 0:
        return _unknown([level], ALL_EQUAL)[level]
    order_N = np.argsort(document_N, kind="stable")  # pairs of a document read the same row of weights
    document_N = document_N[order_N]
    experts, expert_N = np.unique(np.concatenate([high_N[order_N], low_N[order_N]]), return_inverse=True)
    high_row_N, low_row_N = np.split(expert_N, 2)
    tied = int(experts[0] == -1)
    centred_N, centre = _standardised(diff_N[order_N])
    terms_SN = np.stack([np.ones(len(diff_N)), centred_N, centred_N**2])
    generator = np.random.default_rng(seed)
    d_parts = []
    for chunk in _chunks(draws, 8 * len(diff_N)):
        weight_NB = _multinomial(generator, chunk, len(count_G)).T[document_N]
        expert_EB = np.ones((len(experts), chunk))
        if len(experts) > tied:
            expert_EB[tied:] = _multinomial(generator, chunk, len(experts) - tied).T
        weight_NB *= expert_EB[high_row_N]
        weight_NB *= expert_EB[low_row_N]
        d_parts.append(_d_of_sums(_exact_order_product(terms_SN, weight_NB).T, centre=centre))
    d_B = np.concatenate(d_parts)
    kept_B = d_B[np.isfinite(d_B)]
    dropped = draws - len(kept_B)
    reasons = [f"{dropped} of {draws} draws held no pairs that differ and were left out"] if dropped else []
    if len(experts) == tied:
        reasons.append("no end is a single expert: only documents were resampled")
    if not len(kept_B):
        return _unknown([level], reasons[0])[level]
    if np.ptp(kept_B) == 0:
        reasons.append(EQUAL_DRAWS)
    low, high = np.quantile(kept_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), reason="; ".join(reasons))


def _documents(cluster_N: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Pairs of each document, and the index of each pair's document."""
    _, index_N, count_G = np.unique(cluster_N, return_inverse=True, return_counts=True)
    return count_G.astype(np.float64), index_N


def _standardised(diff_N: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Differences moved by their median and scaled, so that sums of squares lose no digits, and zero on that scale.

    The median, not the mean: one huge difference would move the mean far from where most of them are.
    """
    median = float(np.median(diff_N))
    scale = float(np.abs(diff_N - median).max()) or 1.0
    return (diff_N - median) / scale, -median / scale


def _d_of_sums(sums: NDArray[np.float64], *, centre: float) -> NDArray[np.float64]:
    """Mean / sd from sums [..., S] that end in (values, squares) and begin with the count; NaN where sd is 0.

    ``centre`` is where a difference of 0 lies on the scale of the sums.
    """
    n, total, squares = sums[..., 0], sums[..., -2], sums[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        deviations = squares - total * mean
        # What equal values leave behind by rounding is not spread.
        sd = np.sqrt(np.where(deviations > 1e-12 * squares, deviations, np.nan) / (n - 1))
        d: NDArray[np.float64] = (mean - centre) / sd
    return d


def _mean_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean from sums [..., S] that begin with (count, total)."""
    mean: NDArray[np.float64] = sums[..., 1] / sums[..., 0]
    return mean


def _weighted_sums(sums_GS: NDArray[np.float64], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Sums [chunk, S] of the documents drawn, for every draw, in chunks."""
    generator = np.random.default_rng(seed)
    terms_SG = np.ascontiguousarray(sums_GS.T)
    for chunk in _chunks(draws, 8 * len(sums_GS)):
        yield _exact_order_product(_multinomial(generator, chunk, len(sums_GS)), terms_SG.T)


def _multinomial(generator: np.random.Generator, draws: int, items: int) -> NDArray[np.float64]:
    """Weights [draws, items]: how often each item came in ``items`` draws with replacement.

    Counting drawn indices is many times faster than ``Generator.multinomial``, which draws a binomial per weight.
    """
    drawn = generator.integers(0, items, size=(draws, items))
    drawn += np.arange(draws)[:, None] * items
    return np.bincount(drawn.ravel(), minlength=draws * items).reshape(draws, items).astype(np.float64)


def _exact_order_product(a_IJ: NDArray[np.float64], b_JK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix product that never goes through BLAS, whose last bits depend on its number of threads."""
    product: NDArray[np.float64] = np.einsum("ij,jk->ik", a_IJ, b_JK, optimize=False)
    return product


def _chunks(draws: int, bytes_per_draw: int) -> Iterator[int]:
    """Sizes of consecutive chunks of draws; they depend on the data's shape alone, so that a seed gives one result."""
    size = max(1, CHUNK_BYTES // bytes_per_draw)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def _bca(
    value_B: NDArray[np.float64], estimate: float, jackknife_G: NDArray[np.float64], *, levels: Sequence[float]
) -> dict[float, Interval]:
    """Bias-corrected and accelerated intervals from draws, the estimate and the leave-one-document-out estimates."""
    kept_B = value_B[np.isfinite(value_B)]
    dropped = len(value_B) - len(kept_B)
    counted = f"{dropped} of {len(value_B)} draws held no differences that vary" if dropped else ""
    if dropped > UNDEFINED_SHARE * len(value_B) or not np.isfinite(jackknife_G).all():
        return _unknown(levels, f"{counted}: too few documents differ")
    low, high = float(kept_B.min()), float(kept_B.max())
    if low == high:
        return {level: Interval(low=low, high=high, reason=EQUAL_DRAWS) for level in levels}
    below = float((kept_B < estimate).mean() + (kept_B == estimate).mean() / 2)
    # With the estimate beyond all draws the correction would be infinite: it is what half a draw beyond would give.
    bias = float(special.ndtri(np.clip(below, 0.5 / len(kept_B), 1 - 0.5 / len(kept_B))))
    influence_G = jackknife_G.mean() - jackknife_G
    squares = float((influence_G**2).sum())
    acceleration = float((influence_G**3).sum()) / (6 * squares**1.5) if squares else 0.0
    intervals = {}
    for level in levels:
        z_2 = bias + special.ndtri([(1 - level) / 2, (1 + level) / 2])
        room_2 = 1 - acceleration * z_2
        beyond = bool((room_2 <= 0).any())
        moved_2 = np.where(room_2 > 0, bias + z_2 / np.where(room_2 > 0, room_2, 1), np.copysign(np.inf, z_2))
        ends_2 = np.quantile(kept_B, special.ndtr(moved_2))
        reasons = [text for text in (counted and f"{counted}: left out", EXTREME_DRAW if beyond else "") if text]
        intervals[level] = Interval(low=float(ends_2[0]), high=float(ends_2[1]), reason="; ".join(reasons))
    return intervals


def _unknown(levels: Sequence[float], reason: str) -> dict[float, Interval]:
    return {level: Interval(low=float("nan"), high=float("nan"), reason=reason) for level in levels}
