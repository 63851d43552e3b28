"""The studies of one layer, as a worker makes them from the effects that were committed.

Kept apart from what only the driver needs: a worker that imports this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray.cloudpickle

from audit.effects import REDISTRIBUTION
from audit.interventions import COUNTED
from audit.runfolder import RunFolder
from audit.studies.active_experts import COLUMNS, active_experts
from audit.studies.importance import Cell, LayerStudy, Question, study_layer
from audit.studies.progressive import ProgressiveSettings, area_table, progressive_table
from audit.studies.redistribution import redistribution_layers, weight_and_gap

_WHAT = ("layer", "unit", "intervention", "target", "parameter", "scope")
_ORDER = (*_WHAT, "sequence", "position", "expert", "draw")
_READ = tuple(dict.fromkeys([*_WHAT, *COLUMNS, "slot", *REDISTRIBUTION]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributionSettings:
    """What the redistribution study takes from the specification."""

    scope: str
    seed: int


@dataclass(slots=True)
class LayerResult:
    """What the effects of one layer gave."""

    importance: list[LayerStudy] = field(default_factory=list)
    progressive: pd.DataFrame | None = None
    areas: pd.DataFrame | None = None
    redistribution: pd.DataFrame | None = None
    weight_and_gap: pd.DataFrame | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStudies:
    """The studies of one layer, as a worker is told to make them: a function of a row of a Ray Dataset.

    ``url``: the run folder. ``model``: what cells call it. ``metrics``: the run's, over all domains. None is not made.
    """

    url: str
    model: str
    metrics: pd.DataFrame | None
    question: Question | None
    progressive: ProgressiveSettings | None
    redistribution: RedistributionSettings | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        effects = _effects_of(RunFolder(self.url), row["layer"])
        zero = effects["intervention"] == "zero"
        found = LayerResult()
        if self.question is not None and self.metrics is not None:
            found.importance = list(self._importance(effects, row["layer"], self.metrics, self.question))
        removals = effects[zero & (effects["unit"] == "set") & effects["target"].str.startswith(COUNTED, na=False)]
        if self.progressive is not None and len(removals):
            found.progressive = progressive_table(removals, self.progressive)
            found.areas = area_table(removals, self.progressive)
        single = effects[zero & (effects["unit"] == "expert") & effects["slot"].notna()]
        if self.redistribution is not None and len(single):
            scope, seed = self.redistribution.scope, self.redistribution.seed
            found.redistribution = redistribution_layers(single, scope=scope, seed=seed)
            found.weight_and_gap = weight_and_gap(single, scope=scope)
        return {"layer": row["layer"], "result": ray.cloudpickle.dumps(found)}

    def _importance(
        self, effects: pd.DataFrame, layer: int, metrics: pd.DataFrame, question: Question
    ) -> Iterator[LayerStudy]:
        """One study for every intervention on single experts."""
        single = effects[effects["unit"] == "expert"]
        identity = effects[effects["unit"] == "identity"]
        for (kind, _, scope), rows in single.groupby(["intervention", "parameter", "scope"], dropna=False, sort=True):
            parameter = rows["parameter"].iloc[0]
            name = str(kind) if np.isnan(parameter) else f"{kind}({parameter:g})"
            cell = Cell(model=self.model, layer=layer, intervention=name, scope=str(scope))
            noise = identity[identity["scope"] == scope]
            yield study_layer(active_experts(rows), metrics, noise, cell, question)


def _effects_of(folder: RunFolder, layer: int) -> pd.DataFrame:
    """The effects of one layer, words as text, in an order that does not depend on who wrote them when."""
    table = folder.dataset("effects").to_table(columns=list(_READ), filter=pc.field("layer") == layer)
    frame: pd.DataFrame = table.to_pandas()
    words = [column.name for column in table.schema if pa.types.is_dictionary(column.type)]
    frame = frame.assign(**{name: frame[name].astype(object) for name in words})
    return frame.sort_values(list(_ORDER), ignore_index=True)
