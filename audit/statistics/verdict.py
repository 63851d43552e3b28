"""Verdicts: what the statistics of one cell allow to be said, and why, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from audit.statistics.effect_size import equivalence_n, needed_n

Word = Literal[
    "predicts", "reversed", "associated", "practically null", "undecided", "below noise floor", "not estimable"
]
Bounds = tuple[float, float]  # low, high; both nan where not estimable


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict rests on. ``missing`` says why there can be none; it is empty where every number is there.

    ``orientation``: 1 high values mean important (or were turned to), -1 likewise turned by the caller, 0 the metric
    claims neither. ``superiority_90``: nan where it cannot be estimated. ``p_permutation``, ``noise_floor``: None where
    not computed, not measured.
    """

    missing: str
    orientation: int
    n: int
    d: float
    exact_95: Bounds  # of d, from the non-central t
    exact_corrected: Bounds  # the same at level 1 - 2 alpha_corrected
    cluster_95: Bounds  # of d, bootstrap by document
    cluster_90: Bounds
    superiority_90: Bounds  # of P(high > low) + P(tie)/2, bootstrap by document
    p_t: float
    p_wilcoxon: float
    p_t_cluster: float
    p_permutation: float | None
    median_abs_effect: float
    noise_floor: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The thresholds: alpha as it is and corrected for the cell's family, the margins around d = 0 and P = 0.5."""

    alpha: float
    alpha_corrected: float
    margin: float
    superiority_margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``n_to_decide``: pairs after which an undecided cell should be decided; None elsewhere, and where none would."""

    word: Word
    reason: str
    n_to_decide: int | None = None


def verdict(evidence: Evidence, rule: Rule) -> Verdict:
    """The first that holds: not estimable, below noise floor, practically null, predicts/reversed, undecided.

    A metric of orientation 0 makes no claim that could be right or wrong: where another one would read ``predicts`` or
    ``reversed`` it reads ``associated``. Source: this project (two one-sided tests, Schuirmann 1987, and A's dual test
    with document-cluster-robust companions).
    """
    if evidence.missing:
        return Verdict(word="not estimable", reason=evidence.missing)
    if evidence.noise_floor is not None and evidence.median_abs_effect < evidence.noise_floor:
        return Verdict(
            word="below noise floor",
            reason=f"the median |effect|, {evidence.median_abs_effect:.2g}, is below what numerics alone do "
            f"({evidence.noise_floor:.2g})",
        )
    if practically_null(evidence, rule, evidence.exact_corrected):
        return Verdict(
            word="practically null",
            reason=f"d lies in {_told(evidence.exact_corrected)} (bootstrap by document: {_told(evidence.cluster_90)}) "
            f"and P(high > low) in {_told(evidence.superiority_90)}: within ±{rule.margin:g} and "
            f"0.5 ± {rule.superiority_margin:g}",
        )
    obstacles = _obstacles(evidence, rule)
    if not obstacles:
        return Verdict(word=_direction(evidence), reason=_finding(evidence, rule))
    return _undecided(evidence, rule, obstacles)


def practically_null(evidence: Evidence, rule: Rule, exact: Bounds) -> bool:
    """Whether ``exact``, an interval of d, and the intervals by document lie within the margins.

    That of superiority as well: d is blind to order under heavy tails. An interval that is nan lies within nothing.
    """
    return (
        _within(exact, 0.0, rule.margin)
        and _within(evidence.cluster_90, 0.0, rule.margin)
        and _within(evidence.superiority_90, 0.5, rule.superiority_margin)
    )


def _obstacles(evidence: Evidence, rule: Rule) -> list[str]:
    """What speaks against a difference in one direction; empty where nothing does."""
    tests = {"p_t": evidence.p_t, "p_wilcoxon": evidence.p_wilcoxon, "p_t_cluster": evidence.p_t_cluster}
    found = [
        f"{name} is {p:.2g}, not below {rule.alpha_corrected:.2g}"
        for name, p in tests.items()
        if not p < rule.alpha_corrected
    ]
    intervals = {"the exact interval of d": evidence.exact_95, "that by document": evidence.cluster_95}
    found += [
        f"{name} {_told(bounds)} holds 0 or lies on the other side of it"
        for name, bounds in intervals.items()
        if not min(math.copysign(1.0, evidence.d) * bound for bound in bounds) > 0
    ]
    if _arbitrary(evidence, rule):
        found.append(
            f"p_permutation is {evidence.p_permutation:.2g}: an arbitrary ranking of these experts does as well"
        )
    return found


def _undecided(evidence: Evidence, rule: Rule, obstacles: list[str]) -> Verdict:
    not_null = f"not shown to be within ±{rule.margin:g}"
    if math.isnan(evidence.superiority_90[0]):
        not_null += " (P(high > low) has no interval)"
    told = f"d = {evidence.d:.3g}, {not_null}; {'; '.join(obstacles)}"
    pairs = _pairs_to_decide(evidence, rule)
    if pairs is None:
        return Verdict(word="undecided", reason=f"undecided: more pairs would not decide if d stays the same; {told}")
    if pairs <= evidence.n:
        return Verdict(word="undecided", reason=f"undecided, though not for want of pairs; {told}")
    return Verdict(
        word="undecided", reason=f"undecided: about {_rounded(pairs):,} pairs would decide; {told}", n_to_decide=pairs
    )


def _pairs_to_decide(evidence: Evidence, rule: Rule) -> int | None:
    """The n at which d as it was observed would be practically null, or be found with a power of 80 %.

    Documents that resemble themselves make pairs worth less: n is multiplied by the square of how much wider the
    interval by document is than the exact one (Kish's design effect).
    """
    options = [equivalence_n(evidence.d, rule.margin, rule.alpha_corrected)]
    if not _arbitrary(evidence, rule):
        options.append(needed_n(evidence.d, rule.alpha_corrected))
    known = [n for n in options if n is not None]
    wider = (evidence.cluster_95[1] - evidence.cluster_95[0]) / (evidence.exact_95[1] - evidence.exact_95[0])
    return math.ceil(min(known) * max(1.0, wider**2)) if known else None


def _arbitrary(evidence: Evidence, rule: Rule) -> bool:
    return evidence.p_permutation is not None and not evidence.p_permutation < rule.alpha


def _direction(evidence: Evidence) -> Word:
    if evidence.orientation == 0:
        return "associated"
    return "predicts" if evidence.d > 0 else "reversed"


def _finding(evidence: Evidence, rule: Rule) -> str:
    more = "more" if evidence.d > 0 else "less"
    told = (
        f"d = {evidence.d:.3g} {_told(evidence.exact_95)}, by document {_told(evidence.cluster_95)}: experts ranked "
        f"high matter {more}; p_t, p_wilcoxon and p_t_cluster are below {rule.alpha_corrected:.2g}"
    )
    if evidence.p_permutation is None:
        return f"{told}; without p_permutation it is open whether an arbitrary ranking would do as well"
    return f"{told}, p_permutation is {evidence.p_permutation:.2g}"


def _within(bounds: Bounds, centre: float, margin: float) -> bool:
    return centre - margin <= bounds[0] and bounds[1] <= centre + margin


def _told(bounds: Bounds) -> str:
    return f"[{bounds[0]:.3g}, {bounds[1]:.3g}]"


def _rounded(n: int) -> int:
    """Two significant digits: the n that would decide is not known any better."""
    return int(float(f"{n:.2g}"))
