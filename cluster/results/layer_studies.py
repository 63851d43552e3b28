"""The studies of one layer, as workers make them from the effects that were committed.

Kept apart from what only the driver needs: a worker that imports this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.effects import OUTCOMES, REDISTRIBUTION
from audit.interventions import COUNTED
from audit.statistics.cells import Settings
from audit.statistics.pooled import PooledLine, ScaledLayer
from audit.studies.active_experts import COLUMNS, ActiveExperts, active_experts
from audit.studies.importance import CandidateStudy, Cell, Question, study_layer
from audit.studies.importance_tables import pooled_key
from audit.studies.progressive import ProgressiveSettings, area_table, progressive_table
from audit.studies.redistribution import redistribution_layers, weight_and_gap
from cluster.results.layer_rows import EffectFiles

_REMOVALS = ("document", "delta_loss", "kl")
_SINGLE = ("document", "slot", "routing_weight", "gap_norm", *REDISTRIBUTION)


class What(NamedTuple):
    """What was done to single experts, told apart by the effect table."""

    intervention: str
    parameter: float | None
    scope: str

    @property
    def name(self) -> str:
        return self.intervention if self.parameter is None else f"{self.intervention}({self.parameter:g})"

    def rows(self) -> pc.Expression:
        parameter = pc.field("parameter")
        return (
            (pc.field("unit") == "expert")
            & (pc.field("intervention") == self.intervention)
            & (parameter.is_null() if self.parameter is None else parameter == pa.scalar(self.parameter, pa.float32()))
            & (pc.field("scope") == self.scope)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributionSettings:
    """What the redistribution study takes from the specification."""

    scope: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerLines:
    """The pairs behind one candidate's pooled lines at one layer: 8 bytes per token and outcome, 16 per token.

    ``scaled``: per line the differences [N] in units of their standard deviation, nan where a token has no pair; none
    where the layer is left out, for the reason given.
    """

    layer: int
    keys: Sequence[Mapping[str, Any]]
    reasons: Sequence[str]
    token_N: NDArray[np.int64]
    document_N: NDArray[np.int64]
    scaled: Sequence[NDArray[np.float64] | None]

    @staticmethod
    def of(study: CandidateStudy, active: ActiveExperts) -> LayerLines:
        token_N = (active.sequence_N << 32) + active.position_N
        reasons, scaled = [], list[NDArray[np.float64] | None]()
        for _, pairs in study.lines:
            found = pairs.scaled()
            reasons.append(found.reason)
            if found.reason:
                scaled.append(None)
                continue
            scaled_N = np.full(len(token_N), np.nan)
            scaled_N[np.searchsorted(token_N, found.token_N)] = found.scaled_N
            scaled.append(scaled_N)
        return LayerLines(
            layer=study.cell.layer,
            keys=[pooled_key(key) for key, _ in study.lines],
            reasons=reasons,
            token_N=token_N,
            document_N=active.document_N,
            scaled=scaled,
        )

    def line(self, number: int) -> ScaledLayer:
        scaled_N = self.scaled[number]
        if scaled_N is None:
            nothing = self.token_N[:0]
            reason = self.reasons[number]
            return ScaledLayer(token_N=nothing, document_N=nothing, scaled_N=np.zeros(0), reason=reason)
        there = ~np.isnan(scaled_N)
        return ScaledLayer(token_N=self.token_N[there], document_N=self.document_N[there], scaled_N=scaled_N[there])


def pooled_rows(layers: Sequence[Callable[[], LayerLines]], settings: Settings) -> list[dict[str, Any]]:
    """A candidate's pooled lines; ``layers``, ascending, are fetched one at a time."""
    first = layers[0]()
    rows = []
    for number, key in enumerate(first.keys):
        line = PooledLine()
        for fetch in layers:
            lines = fetch()
            line.add(lines.layer, lines.line(number))
        rows.append(line.row(key, settings))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStudies:
    """The studies of one layer; each method reads what it needs of the layer's effects and no more.

    ``model``: what cells call it. ``metrics``: the run's, over all domains. What is None is not asked for.
    """

    files: EffectFiles
    model: str
    metrics: pd.DataFrame | None = None
    question: Question | None = None
    progressive_settings: ProgressiveSettings | None = None
    redistribution_settings: RedistributionSettings | None = None

    def importance(self, layer: int, what: What) -> Iterator[LayerLines | dict[str, pa.Table] | list[CandidateStudy]]:
        """Per candidate its lines and, where asked for, its contrasts by outcome; last the studies without their pairs.

        One candidate's pairs are in memory at a time.
        """
        assert self.question is not None
        assert self.metrics is not None
        cell = Cell(model=self.model, layer=layer, intervention=what.name, scope=what.scope)
        of_nothing = (pc.field("unit") == "identity") & (pc.field("scope") == what.scope)
        noise = self.files.frame(layer, ["document", *OUTCOMES], of_nothing)
        active = active_experts(self.files.frame(layer, COLUMNS, what.rows()))
        studies: list[CandidateStudy] = []
        for study in study_layer(active, self.metrics, noise, cell, self.question):
            if study.lines:
                yield LayerLines.of(study, active)
                if self.question.contrasts:
                    yield {
                        str(key["outcome"]): pa.Table.from_pandas(table, preserve_index=False)
                        for (key, _), table in zip(study.lines, study.contrasts, strict=True)
                    }
            studies.append(replace(study, lines=[], contrasts=[]))
        yield studies

    def progressive(self, layer: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The curves and the areas of the layer's removals."""
        assert self.progressive_settings is not None
        in_order = pc.starts_with(pc.field("target").cast(pa.string()), COUNTED[0])
        for name in COUNTED[1:]:
            in_order |= pc.starts_with(pc.field("target").cast(pa.string()), name)
        zero = (pc.field("unit") == "set") & (pc.field("intervention") == "zero")
        removals = self.files.frame(layer, _REMOVALS, zero & in_order)
        return progressive_table(removals, self.progressive_settings), area_table(removals, self.progressive_settings)

    def redistribution(self, layer: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """What remains beside what went, and routing weight against gap; None where no expert was active."""
        assert self.redistribution_settings is not None
        scope, seed = self.redistribution_settings.scope, self.redistribution_settings.seed
        active = What("zero", None, scope).rows() & pc.field("slot").is_valid()
        single = self.files.frame(layer, _SINGLE, active)
        if not len(single):
            return None
        return redistribution_layers(single, scope=scope, seed=seed), weight_and_gap(single, scope=scope)
