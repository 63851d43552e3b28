"""The two ends of a ranking of a token's active experts, and the difference of their effects.

Several experts tied at an end stand for it together, by their mean effect: ids must not decide. A token whose experts
are all tied has no ends (arXiv 2606.10703; the treatment of ties is this project's).

Shapes: N tokens, K active experts, O outcomes, R rankings, E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The experts at the top and at the bottom [N, K], and the tokens [N] where these differ."""

    high_NK: Flags
    low_NK: Flags
    paired_N: Flags

    def effects(self, effect_NKO: Floats) -> tuple[Floats, Floats]:
        """Mean effect [N, O] of the experts at the top, and at the bottom; only paired tokens mean something."""
        return _mean_over(self.high_NK, effect_NKO), _mean_over(self.low_NK, effect_NKO)

    def experts(self, expert_NK: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The expert [N] at the top, and at the bottom; -1 where several are tied there."""
        return _only(self.high_NK, expert_NK), _only(self.low_NK, expert_NK)


def ends(score_NK: Floats) -> Ends:
    """The ends by score; experts whose score is nan are not ranked."""
    scored_NK = ~np.isnan(score_NK)
    top_N1 = np.where(scored_NK, score_NK, -np.inf).max(1, keepdims=True, initial=-np.inf)
    bottom_N1 = np.where(scored_NK, score_NK, np.inf).min(1, keepdims=True, initial=np.inf)
    return Ends(scored_NK & (score_NK == top_N1), scored_NK & (score_NK == bottom_N1), (top_N1 > bottom_N1)[:, 0])


def standardized(high_NO: Floats, low_NO: Floats, paired_N: Flags) -> tuple[Floats, NDArray[np.int64]]:
    """Cohen's d_z [O] of the finite differences at paired tokens, nan where they do not vary, and how many [O]."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference_NO = high_NO - low_NO
    used_NO = np.isfinite(difference_NO) & paired_N[:, None]
    count_O = used_NO.sum(0)
    value_NO = np.where(used_NO, difference_NO, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_O = value_NO.sum(0) / count_O
        square_O = np.where(used_NO, (value_NO - mean_O) ** 2, 0.0).sum(0)
        d_O = mean_O / np.sqrt(square_O / (count_O - 1))
    return np.where(square_O > 0, d_O, np.nan), count_O


def shuffled_rankings(value_E: Floats, rankings: int, rng: np.random.Generator) -> Iterator[Floats]:
    """A metric's values permuted over the experts that have one: rankings [E] that know nothing."""
    ranked = np.flatnonzero(~np.isnan(value_E))
    for _ in range(rankings):
        shuffled_E = np.full(len(value_E), np.nan)
        shuffled_E[ranked] = value_E[rng.permutation(ranked)]
        yield shuffled_E


def shuffled_within_tokens(score_NK: Floats, rankings: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Scores permuted over the scored experts of every token by itself: rankings [N, K] that know nothing."""
    scored_NK = ~np.isnan(score_NK)
    place_NK = np.argsort(~scored_NK, axis=1, kind="stable")  # the scored ones first
    for _ in range(rankings):
        order_NK = np.argsort(np.where(scored_NK, rng.random(score_NK.shape), np.inf), axis=1)
        shuffled_NK = np.full_like(score_NK, np.nan)
        np.put_along_axis(shuffled_NK, place_NK, np.take_along_axis(score_NK, order_NK, 1), 1)
        yield shuffled_NK


def _mean_over(end_NK: Flags, effect_NKO: Floats) -> Floats:
    column_N = end_NK.argmax(1)
    mean_NO: Floats = effect_NKO[np.arange(len(end_NK)), column_N].copy()
    tied = np.flatnonzero(end_NK.sum(1) > 1)
    if len(tied):
        weight_NK1 = end_NK[tied, :, None]
        with np.errstate(invalid="ignore", over="ignore"):  # of effects that are not finite
            mean_NO[tied] = np.where(weight_NK1, effect_NKO[tied], 0.0).sum(1) / weight_NK1.sum(1)
    return mean_NO


def _only(end_NK: Flags, expert_NK: NDArray[np.int64]) -> NDArray[np.int64]:
    alone_N = end_NK.sum(1) == 1
    return np.where(alone_N, expert_NK[np.arange(len(end_NK)), end_NK.argmax(1)], -1)
