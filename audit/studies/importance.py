"""The importance audit: does a metric know which of a token's active experts matters more (arXiv 2606.10703)?

For every audited token the active experts are ranked by the metric; the effect of the lowest is subtracted from that of
the highest. One shared sample of tokens serves every metric, every token-level predictor and both negative controls, so
that all of them stand in one table. ``study_layer`` is all that needs the effects, and gives one candidate after the
other, so that the pairs of one are in memory at a time; ``audit.studies.importance_tables`` puts them together.

Shapes: N tokens, K active experts, O outcomes, R rankings, E experts of the layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.statistics.bootstrap import mean_interval
from audit.statistics.cell import no_spread
from audit.statistics.cells import Pairs, Settings, cell_row
from audit.statistics.pooled import LayerPairs
from audit.statistics.ranks import kendall_rows, spearman_rows, top1_hits
from audit.studies.active_experts import OUTCOMES, PREDICTORS, ActiveExperts
from audit.studies.ends import Floats, ends, standardized
from audit.studies.identity import IDENTITY, identity_cells, noise_quantiles
from audit.studies.null import Null, NullRankings

RANDOM_TOKEN, RANDOM_RANKING = "random_token", "random_ranking"

# What a first-order estimate of the loss can speak about, and for contribution_norm all but what it is itself:
# under zero the stream moves by exactly the contribution.
PREDICTED: Mapping[str, tuple[str, ...]] = {
    "routing_weight": OUTCOMES,
    "contribution_norm": tuple(name for name in OUTCOMES if name != "gap_norm"),
    "attribution": ("delta_loss",),
    "abs_attribution": ("abs_delta_loss", "kl", "js", "tv"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of the effects. ``metrics``: names, or None for all observed ones."""

    metrics: tuple[str, ...] | None = None
    outcomes: tuple[str, ...] = OUTCOMES
    random_rankings: int = 999
    contrasts: bool = False
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The part of a cell's name that all cells of one layer's effects share."""

    model: str
    layer: int
    intervention: str
    scope: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateStudy:
    """What one candidate gives at one layer, or the identity rows do: rows of the cell, correlation and control tables,
    and the pairs behind its pooled lines and contrasts.
    """

    cell: Cell
    candidate: str
    cells: list[dict[str, Any]]
    correlations: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    lines: list[tuple[dict[str, Any], LayerPairs]] = field(default_factory=list)
    contrasts: list[pd.DataFrame] = field(default_factory=list)  # one per line, where they are asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    """Something that ranks a token's experts."""

    name: str
    label: str
    orientation: int
    score_NK: Floats  # oriented: high claims important
    outcomes: Sequence[str]
    value_E: Floats | None = None  # of a metric: one value per expert of the layer


def study_layer(
    active: ActiveExperts, metrics: pd.DataFrame, noise: pd.DataFrame, cell: Cell, question: Question
) -> Iterator[CandidateStudy]:
    """Every cell of one layer, intervention and scope, candidate by candidate; the identity's come last.

    ``metrics``: the rows of ``results/metrics.parquet`` over all domains; ``noise``: |outcome| and ``delta_loss`` of
    the layer's identity rows, with their document. Raises ValueError where there is nothing to study: no effects, or a
    metric named in the question that has no values at this layer.
    """
    if not len(active):
        raise ValueError(
            f"active: layer {cell.layer} has no effects of single experts; measure at least one token there"
        )
    effect_NKO = np.stack([active.outcomes[name] for name in question.outcomes], axis=-1)
    null = NullRankings(active, effect_NKO, question.random_rankings, partial(_generator, question, cell))
    floors = noise_quantiles(noise, question.outcomes)
    for candidate in _candidates(active, metrics, cell, question):
        yield _study(candidate, active, effect_NKO, null, floors, cell, question)
    yield CandidateStudy(
        cell=cell, candidate=IDENTITY, cells=identity_cells(noise, floors, asdict(cell), question.settings)
    )


def _study(
    candidate: _Candidate,
    active: ActiveExperts,
    effect_NKO: Floats,
    null: NullRankings,
    floors: Mapping[str, float | None],
    cell: Cell,
    question: Question,
) -> CandidateStudy:
    study = CandidateStudy(cell=cell, candidate=candidate.name, cells=[])
    token_N = (active.sequence_N << 32) + active.position_N
    found = ends(candidate.score_NK)
    high_NO, low_NO = found.effects(effect_NKO)
    high_expert_N, low_expert_N = found.experts(active.expert_NK)
    d_O, _ = standardized(high_NO, low_NO, found.paired_N)
    value_E = candidate.value_E
    unknowing = null.within_tokens(candidate.score_NK) if value_E is None else null.over_experts(value_E)
    for o, outcome in enumerate(question.outcomes):
        if outcome not in candidate.outcomes:
            continue
        defined_N = active.defined_N(outcome)
        used = np.flatnonzero(found.paired_N & defined_N)
        key = {
            "model": cell.model, "layer": cell.layer, "metric": candidate.name, "outcome": outcome,
            "intervention": cell.intervention, "scope": cell.scope, "label": candidate.label,
            "orientation": candidate.orientation,
        }  # fmt: skip
        pairs = Pairs(
            high_N=high_NO[used, o],
            low_N=low_NO[used, o],
            document_N=active.document_N[used],
            expert_high_N=high_expert_N[used],
            expert_low_N=low_expert_N[used],
        )
        row = cell_row(
            pairs,
            key,
            question.settings,
            ties=int((defined_N & ~found.paired_N & found.high_NK.any(1)).sum()),
            p_permutation=None if no_spread(pairs.finite()) else unknowing.p(d_O[o], o),
            noise_floor=floors[outcome],
        )
        row["notes"] = "; ".join(filter(None, [row["notes"], _unranked(active, candidate.score_NK, defined_N)]))
        study.cells.append(row)
        study.correlations.append(key | _correlation(active, candidate.score_NK, outcome, question.settings))
        study.lines.append((key, LayerPairs(token_N=token_N[used], pairs=pairs)))
        if candidate.name in (RANDOM_TOKEN, RANDOM_RANKING):
            study.controls.append(key | _rejection(unknowing, o))
        if question.contrasts:
            study.contrasts.append(_contrasts(active, key, used, pairs))
    return study


# ---- what ranks experts ----------------------------------------------------------------------------------------------


def _candidates(active: ActiveExperts, metrics: pd.DataFrame, cell: Cell, question: Question) -> Iterator[_Candidate]:
    experts = int(max(metrics["expert"].max(), active.expert_NK.max()) if len(metrics) else active.expert_NK.max()) + 1
    here = metrics[metrics["layer"] == cell.layer]
    names = list(dict.fromkeys(here["metric"])) if question.metrics is None else question.metrics
    for name in names:
        rows = here[here["metric"] == name]
        if not len(rows):
            raise ValueError(
                f"question.metrics: {name!r} has no values at layer {cell.layer}; "
                f"known there are {', '.join(sorted(set(here['metric']))) or 'none'}"
            )
        value_E = np.full(experts, np.nan)
        value_E[rows["expert"].to_numpy(np.int64)] = rows["value"].to_numpy(np.float64)
        orientation = int(rows["orientation"].iloc[0])
        oriented_E = value_E * (orientation or 1)
        yield _Candidate(
            name=name, label=str(rows["label"].iloc[0]), orientation=orientation,
            score_NK=active.scores(oriented_E), outcomes=question.outcomes, value_E=oriented_E,
        )  # fmt: skip
    for name in PREDICTORS:
        score_NK = active.predictors[name]
        if np.isnan(score_NK).all():
            continue  # attribution that was not asked for
        yield _Candidate(
            name=name, label="control", orientation=1, score_NK=score_NK, outcomes=PREDICTED[name],
        )  # fmt: skip
    rng = _generator(question, cell, "draw")
    blank_NK = np.where(active.expert_NK >= 0, 0.0, np.nan)
    random_NK = blank_NK + rng.random(blank_NK.shape)
    yield _Candidate(
        name=RANDOM_TOKEN, label="control", orientation=1, score_NK=random_NK, outcomes=question.outcomes,
    )  # fmt: skip
    ranking_E = rng.permutation(experts).astype(np.float64)
    yield _Candidate(
        name=RANDOM_RANKING, label="control", orientation=1, score_NK=active.scores(ranking_E),
        outcomes=question.outcomes, value_E=ranking_E,
    )  # fmt: skip


# ---- what a cell is made of ------------------------------------------------------------------------------------------


def _unranked(active: ActiveExperts, score_NK: Floats, defined_N: NDArray[np.bool_]) -> str:
    """What a cell must say of experts that could not be ranked; empty where all were."""
    lacking_NK = np.isnan(score_NK) & (active.expert_NK >= 0) & defined_N[:, None]
    tokens, unscored = int(lacking_NK.any(1).sum()), int((defined_N & np.isnan(score_NK).all(1)).sum())
    if not tokens:
        return ""
    return f"at {tokens} tokens an active expert has no score and was not ranked; at {unscored} of them none has one"


def _correlation(active: ActiveExperts, score_NK: Floats, outcome: str, settings: Settings) -> dict[str, Any]:
    """Rank correlation between scores and effects over a token's active experts, averaged over tokens."""
    effect_NK = active.outcomes[outcome]
    whole = np.flatnonzero((np.isfinite(score_NK) & np.isfinite(effect_NK)).all(1))  # every expert scored and measured
    score_NK, effect_NK, document_N = score_NK[whole], effect_NK[whole], active.document_N[whole]
    found: dict[str, Any] = {"tokens": len(whole), "tokens_left_out": int(active.defined_N(outcome).sum()) - len(whole)}
    reasons = []
    for name, value_N in (
        ("spearman", spearman_rows(score_NK, effect_NK)),
        ("kendall", kendall_rows(score_NK, effect_NK)),
    ):
        known = ~np.isnan(value_N)
        interval = mean_interval(
            value_N[known], document_N[known], level=0.95, draws=settings.bootstrap_draws, seed=settings.seed
        )
        found |= {
            name: float(value_N[known].mean()) if known.any() else np.nan,
            f"{name}_low": interval.low,
            f"{name}_high": interval.high,
            f"{name}_constant": int((~known).sum()),
        }
        reasons.append(interval.reason)
    hit_N, chance_N = top1_hits(score_NK, effect_NK)
    found["top1_hit_rate"] = float(hit_N.mean()) if len(whole) else np.nan
    found["top1_chance"] = float(chance_N.mean()) if len(whole) else np.nan
    found["reason"] = "; ".join(dict.fromkeys(filter(None, reasons)))
    return found


def _rejection(null: Null, outcome: int) -> dict[str, Any]:
    found = null.rejection_rate(outcome)
    share, error, rankings = (np.nan, np.nan, 0) if found is None else found
    return {"rankings": rankings, "rejection_rate": share, "monte_carlo_error": error}


def _contrasts(active: ActiveExperts, key: Mapping[str, Any], used: NDArray[np.int64], pairs: Pairs) -> pd.DataFrame:
    """Rows of the public contrast table."""
    return pd.DataFrame(
        {name: key[name] for name in ("model", "layer", "metric", "outcome", "intervention", "scope", "label")}
        | {
            "document": active.document_N[used],
            "sequence": active.sequence_N[used],
            "position": active.position_N[used],
            "expert_high": _nullable(pairs.expert_high_N),
            "expert_low": _nullable(pairs.expert_low_N),
            "effect_high": pairs.high_N,
            "effect_low": pairs.low_N,
        }
    )


def _nullable(expert_N: NDArray[np.int64]) -> pd.Series[Any]:
    return pd.Series(expert_N, dtype="Int64").mask(expert_N < 0)


def _generator(question: Question, cell: Cell, purpose: str) -> np.random.Generator:
    """The random numbers of one purpose in one cell, whatever else is computed before."""
    words = f"{cell.model}/{cell.layer}/{cell.intervention}/{cell.scope}/{purpose}"
    return np.random.default_rng([question.settings.seed, zlib.crc32(words.encode())])
