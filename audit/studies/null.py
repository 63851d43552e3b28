"""Rankings that know nothing: what Cohen's d they reach, and how often they look significant (this project).

The tokens are a sample, a model's experts are not: a paired test speaks about this ranking of these experts, and an
arbitrary fixed ranking of experts that truly differ is often significant. So a metric is held against permutations of
its own values over the experts of the layer, a token-level predictor against permutations within every token.

Shapes: N tokens, K active experts, O outcomes, R rankings, E experts of the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from audit.studies.active_experts import ActiveExperts
from audit.studies.ends import Floats, ends, shuffled_rankings, shuffled_within_tokens, standardized


@dataclass(frozen=True, slots=True, eq=False)
class Null:
    """Cohen's d [R, O] of the rankings and the pairs [R, O] each comes from."""

    d_RO: Floats
    pairs_RO: NDArray[np.int64]

    def p(self, d: float, outcome: int) -> float | None:
        """(1 + #{|d*| >= |d|}) / (R + 1); None where d does not exist."""
        if np.isnan(d):
            return None
        known_R = self.d_RO[~np.isnan(self.d_RO[:, outcome]), outcome]
        return float((1 + (np.abs(known_R) >= abs(d)).sum()) / (len(known_R) + 1))

    def rejection_rate(self, outcome: int, alpha: float = 0.05) -> tuple[float, float, int] | None:
        """Share of the rankings with a paired t test below alpha, its Monte-Carlo error, and of how many."""
        d_R, n_R = self.d_RO[:, outcome], self.pairs_RO[:, outcome]
        known_R = ~np.isnan(d_R)
        rankings = int(known_R.sum())
        if not rankings:
            return None
        p_R = 2 * student.sf(np.abs(d_R[known_R]) * np.sqrt(n_R[known_R]), n_R[known_R] - 1)
        share = float((p_R < alpha).mean())
        return share, sqrt(share * (1 - share) / rankings), rankings


class NullRankings:
    """The nulls of one layer's effects; candidates whose ties are alike share one."""

    def __init__(
        self, active: ActiveExperts, effect_NKO: Floats, rankings: int, generator: Callable[[str], np.random.Generator]
    ) -> None:
        self._active, self._effect_NKO, self._rankings, self._generator = active, effect_NKO, rankings, generator
        self._found: dict[tuple[str, bytes], Null] = {}

    def over_experts(self, value_E: Floats) -> Null:
        """Of a metric: its values permuted over the experts that have one."""
        rank_E = rankdata(value_E, nan_policy="omit")
        known_E = ~np.isnan(rank_E)
        rank_E[known_E] = np.sort(rank_E[known_E])  # so that it does not matter which candidate comes first
        key = ("experts", _digest(rank_E))
        if key not in self._found:
            rankings = shuffled_rankings(rank_E, self._rankings, self._generator("over experts"))
            self._found[key] = self._reached(self._active.scores(rank) for rank in rankings)
        return self._found[key]

    def within_tokens(self, score_NK: Floats) -> Null:
        """Of a token-level predictor: its scores permuted over the active experts of every token."""
        ordered_NK = np.sort(score_NK, axis=1)
        tied = bool((ordered_NK[:, 1:] == ordered_NK[:, :-1]).any())
        if not tied:  # all scores without ties are permuted alike: it does not matter which candidate comes first
            score_NK = np.where(np.isnan(score_NK), np.nan, np.arange(score_NK.shape[1]))
        key = ("tokens", _digest(score_NK))
        if key not in self._found:
            self._found[key] = self._reached(
                shuffled_within_tokens(score_NK, self._rankings, self._generator("within tokens"))
            )
        return self._found[key]

    def _reached(self, scores: Iterable[Floats]) -> Null:
        d: list[Floats] = []
        pairs: list[NDArray[np.int64]] = []
        for score_NK in scores:
            found = ends(score_NK)
            high_NO, low_NO = found.effects(self._effect_NKO)
            d_O, pairs_O = standardized(high_NO, low_NO, found.paired_N)
            d.append(d_O)
            pairs.append(pairs_O)
        return Null(np.array(d), np.array(pairs))


def _digest(values: Floats) -> bytes:
    """Stands for the values: they themselves would fill the memory with one copy per kind of ties."""
    return hashlib.sha256(np.ascontiguousarray(values).data).digest()
