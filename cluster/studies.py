"""The studies of a run, made layer by layer on Ray from what was committed; what they compute is in audit.studies.

A worker holds one layer's effects at a time, the driver what every layer gave: for the importance audit every pair, 40
bytes per (token, layer, metric, outcome). A layer's result depends on its effects alone, and layers are put together in
order: any number of workers gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray.cloudpickle
import ray.data

from audit.config import AuditConfig
from audit.config.studies import ImportanceConfig, ProgressiveConfig
from audit.observations.registry import find_metric
from audit.published.released_code import METRICS as RELEASED
from audit.runfolder import RunFolder
from audit.statistics.cells import Settings
from audit.studies.active_experts import COLUMNS, active_experts
from audit.studies.findings import findings, null_rates
from audit.studies.importance import Cell, LayerStudy, Question, study_layer
from audit.studies.importance_tables import importance_tables
from audit.studies.progressive import ProgressiveSettings, area_table, progressive_table
from audit.studies.redundancy import RedundancySettings, redundancy_tables

_WHAT = ("layer", "unit", "intervention", "target", "parameter", "scope")
_ORDER = (*_WHAT, "sequence", "position", "expert", "draw")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """The studies of one layer, as a worker is told to make them. ``metrics``: the run's, over all domains."""

    url: str
    model: str
    metrics: pd.DataFrame
    question: Question | None
    progressive: ProgressiveSettings | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        effects = _effects_of(RunFolder(self.url), row["layer"])
        found = LayerResult()
        if self.question is not None:
            found.importance = list(self._importance(effects, row["layer"], self.question))
        if self.progressive is not None and (effects["unit"] == "set").any():
            found.progressive = progressive_table(effects, self.progressive)
            found.areas = area_table(effects, self.progressive)
        return {"layer": row["layer"], "result": ray.cloudpickle.dumps(found)}

    def _importance(self, effects: pd.DataFrame, layer: int, question: Question) -> Iterator[LayerStudy]:
        """One study for every intervention on single experts."""
        single = effects[effects["unit"] == "expert"]
        identity = effects[effects["unit"] == "identity"]
        for (kind, _, scope), rows in single.groupby(["intervention", "parameter", "scope"], dropna=False, sort=True):
            parameter = rows["parameter"].iloc[0]
            name = str(kind) if np.isnan(parameter) else f"{kind}({parameter:g})"
            cell = Cell(model=self.model, layer=layer, intervention=name, scope=str(scope))
            noise = identity[identity["scope"] == scope]
            yield study_layer(active_experts(rows), self.metrics, noise, cell, question)


@dataclass(slots=True)
class LayerResult:
    """What the effects of one layer gave."""

    importance: list[LayerStudy] = field(default_factory=list)
    progressive: pd.DataFrame | None = None
    areas: pd.DataFrame | None = None


def make_studies(folder: RunFolder, config: AuditConfig, model: str, metrics: pa.Table) -> dict[str, pa.Table | str]:
    """The results of every study that the specification asks for, by the name of their file: tables and texts.

    ``model``: what cells call it. ``metrics``: the run's table of them.
    """
    studies = config.studies
    results: dict[str, pa.Table | str] = {}
    question = None if studies.importance is None else _question(studies.importance, config.seed)
    progressive = None if studies.progressive is None else _progressive(studies.progressive, config.seed)
    if question is not None or progressive is not None:
        overall = metrics.filter(pc.is_null(metrics["domain"])).to_pandas()
        work = _Layer(url=folder.url, model=model, metrics=overall, question=question, progressive=progressive)
        layers = _per_layer(folder, work)
        if question is not None:
            tables = importance_tables([study for layer in layers for study in layer.importance], question)
            results |= {f"{name}.parquet": _arrow(table) for name, table in tables.items()}
            results["cells.csv"] = tables["cells"].to_csv(index=False, lineterminator="\n")
            results["findings.md"] = (
                f"{findings(tables['cells'], question.settings)} {null_rates(tables['controls'])}\n"
            )
        if progressive is not None:
            results["progressive.parquet"] = _arrow(_joined(layer.progressive for layer in layers))
            results["areas.parquet"] = _arrow(_joined(layer.areas for layer in layers))
    if studies.redundancy is not None:
        settings = RedundancySettings(
            margin=studies.redundancy.margin, bootstrap_draws=studies.redundancy.bootstrap_draws, seed=config.seed
        )
        found = redundancy_tables(folder.dataset("pruning").to_table(), settings)
        results["redundancy.parquet"] = _arrow(found.criteria)
        results["redundancy_verdicts.parquet"] = _arrow(found.verdicts)
    return results


def _question(config: ImportanceConfig, seed: int) -> Question:
    released = RELEASED if config.released_code else ()
    named = None if config.metrics == "all" else tuple(find_metric(name).name for name in config.metrics)
    return Question(
        metrics=None if named is None else (*named, *released),
        outcomes=config.outcomes,
        random_rankings=config.random_rankings,
        contrasts=config.contrasts,
        settings=Settings(
            alpha=config.alpha,
            margin=config.margin,
            superiority_margin=config.superiority_margin,
            bootstrap_draws=config.bootstrap_draws,
            seed=seed,
            confirmatory=config.confirmatory,
        ),
    )


def _progressive(config: ProgressiveConfig, seed: int) -> ProgressiveSettings:
    return ProgressiveSettings(cliff=config.cliff, seed=seed)


def _per_layer(folder: RunFolder, work: _Layer) -> list[LayerResult]:
    """What ``work`` makes of every layer, in order; each layer is a task of its own."""
    layers = sorted(pc.unique(folder.dataset("effects").to_table(columns=["layer"])["layer"]).to_pylist())
    items = ray.data.from_items([{"layer": layer} for layer in layers], override_num_blocks=len(layers))
    rows = sorted(items.map(work).take_all(), key=lambda row: int(row["layer"]))
    return [ray.cloudpickle.loads(row["result"]) for row in rows]


def _effects_of(folder: RunFolder, layer: int) -> pd.DataFrame:
    """The effects of one layer, words as text, in an order that does not depend on who wrote them when."""
    names = list(dict.fromkeys([*_WHAT, *COLUMNS]))
    table = folder.dataset("effects").to_table(columns=names, filter=pc.field("layer") == layer)
    frame: pd.DataFrame = table.to_pandas()
    words = [column.name for column in table.schema if pa.types.is_dictionary(column.type)]
    frame = frame.assign(**{name: frame[name].astype(object) for name in words})
    return frame.sort_values(list(_ORDER), ignore_index=True)


def _joined(parts: Iterable[pd.DataFrame | None]) -> pd.DataFrame:
    return pd.concat([part for part in parts if part is not None], ignore_index=True)


def _arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)
