"""The cell: every statistic of one metric against one outcome at one layer.

A cell is a (model, layer, metric, outcome, intervention, scope). Its pairs are tokens; a pair's difference is the
effect of the token's active expert that the metric ranks highest minus that of the one it ranks lowest.
Shapes: N pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.statistics.bootstrap import cluster_intervals, pigeonhole_interval
from audit.statistics.effect_size import cohen_d, exact_interval
from audit.statistics.paired import cluster_t, paired_t, sign_test, superiority, superiority_scores, wilcoxon

CELL = ("model", "layer", "metric", "outcome", "intervention", "scope")
KEY = (*CELL, "label", "orientation")
FEW_DOCUMENTS = 30

INTERVALS = tuple(
    f"{name}_{end}"
    for name in ("superiority", "superiority90", "d", "d_boot", "d_boot90", "d_pigeonhole")
    for end in ("low", "high")
)
COUNTS = ("n", "documents", "experts_high", "experts_low", "ties", "dropped_nonfinite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How cells are judged. ``confirmatory``: the outcomes named before the run. Raises ValueError naming the field."""

    alpha: float = 0.05
    margin: float = 0.1  # of d, around 0
    superiority_margin: float = 0.05  # of P(high > low) + P(tie)/2, around .5
    bootstrap_draws: int = 10_000
    seed: int = 0
    confirmatory: tuple[str, ...] = ("delta_loss", "kl")

    def __post_init__(self) -> None:
        for name, right, holds in (
            ("alpha", "a number between 0 and 0.5", 0 < self.alpha < 0.5),
            ("margin", "a positive number", 0 < self.margin < math.inf),
            ("superiority_margin", "a number between 0 and 0.5", 0 < self.superiority_margin < 0.5),
            ("bootstrap_draws", "a whole number of at least 100", self.bootstrap_draws >= 100),
            ("seed", "a whole number of at least 0", self.seed >= 0),
            ("confirmatory", "at least one outcome", len(self.confirmatory) > 0),
        ):
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)!r} cannot be used; it takes {right}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """The pairs of a cell: effects [N] at either end of the ranking, the token's document, the experts at the ends.

    An expert of -1: several tied at that end, the effect is their mean.
    """

    high_N: NDArray[np.float64]
    low_N: NDArray[np.float64]
    document_N: NDArray[np.int64]
    expert_high_N: NDArray[np.int64]
    expert_low_N: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = {len(getattr(self, name)) for name in self.__slots__}
        assert len(sizes) == 1, f"columns of different lengths: {sorted(sizes)}"

    def finite(self) -> Pairs:
        """Those whose difference is a number, in an order that depends on what they hold alone."""
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(self.high_N - self.low_N)
        columns = [getattr(self, name)[finite] for name in self.__slots__]
        order = np.lexsort(columns)
        return Pairs(**{name: column[order] for name, column in zip(self.__slots__, columns, strict=True)})


def cell_row(
    pairs: Pairs,
    key: Mapping[str, Any],
    settings: Settings,
    *,
    ties: int = 0,
    p_permutation: float | None = None,
    noise_floor: float | None = None,
) -> dict[str, Any]:
    """Every statistic of a cell that needs no other cell, for ``cells.cell_table``; docs/tables.md says what each is.

    ``key``: the columns of ``KEY``, ``orientation`` 1 where it is left out. ``ties``: tokens that gave no pair because
    all their experts tied. ``noise_floor``: the quantile of |outcome| over identity rows, in the outcome's unit. What
    cannot be estimated is None, and ``reason`` (the cell as a whole) or ``notes`` say why. Pairs with an effect that is
    not finite are dropped and counted. ``p_superiority`` is the document-cluster-robust t of the scores 1, 1/2, 0 of a
    pair minus 1/2. The order of the pairs does not matter, to the last bit.
    """
    missing = [name for name in KEY if name not in key and name != "orientation"]
    assert not missing, f"key lacks {missing}"
    kept = pairs.finite()
    diff_N = kept.high_N - kept.low_N
    n, documents = len(diff_N), len(np.unique(kept.document_N))
    row: dict[str, Any] = dict.fromkeys((*INTERVALS, "p_superiority", "cohen_d", "p_t", "p_t_cluster", "sd_diff"))
    row |= {"orientation": 1} | dict(key)
    row |= {
        "n": n,
        "documents": documents,
        "experts_high": _distinct(kept.expert_high_N),
        "experts_low": _distinct(kept.expert_low_N),
        "ties": ties,
        "dropped_nonfinite": len(pairs.high_N) - n,
        "mean_diff": float(diff_N.mean()) if n else None,
        "median_diff": float(np.median(diff_N)) if n else None,
        "median_abs_effect": float(np.median(np.abs([kept.high_N, kept.low_N]))) if n else None,
        "noise_floor": noise_floor,
        "share_positive": float((diff_N > 0).mean()) if n else None,
        "superiority": superiority(diff_N) if n else None,
        "p_wilcoxon": _known(wilcoxon(diff_N)) if diff_N.any() else None,
        "p_sign": _known(sign_test(diff_N)) if diff_N.any() else None,
        "p_permutation": p_permutation,
    }
    notes = [f"{row['dropped_nonfinite']} pairs with an effect that is not finite were dropped"]
    notes = notes if row["dropped_nonfinite"] else []
    row["reason"] = no_spread(kept)
    if ties and not n:
        row["reason"] += f"; at {ties} tokens all active experts tied, or there was one alone"
    if not row["reason"]:
        unit_N, unit = in_units(diff_N)
        row["sd_diff"] = float(unit_N.std(ddof=1)) * unit
        row["cohen_d"], row["p_t"] = cohen_d(unit_N), _known(paired_t(unit_N))
        row |= _ends("d", exact_interval(row["cohen_d"], n))
        if documents < 2:
            row["reason"] = "one document only: nothing says how much documents differ"
        else:
            row |= _over_documents(unit_N, kept, settings, seed_of((key[name] for name in CELL), settings), notes)
            row["reason"] = "; ".join(
                f"{name} cannot be estimated"
                for name in ("p_t", "p_wilcoxon", "p_t_cluster", "d_boot_low", "d_boot90_low")
                if row[name] is None
            )
    if 2 <= documents < FEW_DOCUMENTS:
        notes.append(f"{documents} documents: with fewer than {FEW_DOCUMENTS} the intervals by document are optimistic")
    if p_permutation is None:
        notes.append("p_permutation: not computed")
    if noise_floor is None:
        notes.append("noise_floor: not measured")
    row["notes"] = "; ".join(notes)
    return row


def no_spread(pairs: Pairs) -> str:
    """Why the differences of finite pairs have no standard deviation above 0, and so no d; empty where they have."""
    diff_N = pairs.high_N - pairs.low_N
    if len(diff_N) < 2:
        return "n too small for a standard deviation: " + ("1 pair" if len(diff_N) else "no pairs")
    if not diff_N.any():
        return f"all {len(diff_N)} differences are 0: d is not defined"
    # Effects that differ by the same amount may do so up to the rounding of the effects themselves.
    rounding = 4 * np.finfo(np.float64).eps * max(np.abs(pairs.high_N).max(), np.abs(pairs.low_N).max())
    if np.ptp(diff_N) <= rounding:
        return f"all {len(diff_N)} differences are equal ({diff_N[0]:.3g}): their standard deviation is 0"
    return ""


def in_units(diff_N: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Differences, not all 0, divided by a power of two near the largest, which is exact, and that power.

    Squares of the largest and the smallest floats would not be numbers; no test depends on the unit.
    """
    unit = float(np.exp2(np.floor(np.log2(np.abs(diff_N).max()))))
    return diff_N / unit, unit


def seed_of(names: Iterable[Any], settings: Settings) -> int:
    """A seed of their own for a cell's names, so that its bootstrap does not depend on which cells came before."""
    named = json.dumps([settings.seed, *map(str, names)])
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7])


def _over_documents(
    diff_N: NDArray[np.float64], pairs: Pairs, settings: Settings, seed: int, notes: list[str]
) -> dict[str, Any]:
    """What treats documents as the units drawn; what has no value is None and noted."""
    draws, document_N = settings.bootstrap_draws, pairs.document_N
    found = cluster_intervals(diff_N, document_N, levels=(0.95, 0.9), draws=draws, seed=seed)
    pigeonhole = pigeonhole_interval(
        diff_N, document_N, pairs.expert_high_N, pairs.expert_low_N, level=0.95, draws=draws, seed=seed
    )
    intervals = {
        "d_boot": found["d"][0.95],
        "d_boot90": found["d"][0.9],
        "superiority": found["superiority"][0.95],
        "superiority90": found["superiority"][0.9],
        "d_pigeonhole": pigeonhole,
    }
    notes += [f"{name}: {interval.reason}" for name, interval in intervals.items() if interval.reason]
    row: dict[str, Any] = {"p_t_cluster": _known(cluster_t(diff_N, document_N))}
    row["p_superiority"] = _known(cluster_t(superiority_scores(diff_N) - 0.5, document_N))
    if row["p_superiority"] is None:
        notes.append("p_superiority: the documents' scores do not vary")
    for name, interval in intervals.items():
        row |= _ends(name, (interval.low, interval.high))
    return row


def _distinct(expert_N: NDArray[np.int64]) -> int:
    return len(np.unique(expert_N[expert_N >= 0]))


def _ends(name: str, bounds: tuple[float, float]) -> dict[str, float | None]:
    return {f"{name}_low": _known(bounds[0]), f"{name}_high": _known(bounds[1])}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
