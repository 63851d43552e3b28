"""The studies of a run, made layer by layer on Ray from what was committed; what they compute is in audit.studies.

A worker holds one layer's effects at a time, the driver what every layer gave: for the importance audit every pair, 40
bytes per (token, layer, metric, outcome). A layer's result depends on its effects alone, and layers are put together in
order: any number of workers gives the same bytes. A study whose tasks were all given up has no table.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray.cloudpickle
import ray.data

from audit.config import AuditConfig
from audit.config.studies import ImportanceConfig, ProgressiveConfig
from audit.runfolder import RunFolder
from audit.statistics.cells import Settings
from audit.studies.findings import findings, null_rates
from audit.studies.importance import LayerStudy, Question
from audit.studies.importance_tables import importance_tables
from audit.studies.progressive import ProgressiveSettings
from audit.studies.redistribution import depth_profile
from audit.studies.redundancy import RedundancySettings, redundancy_tables
from cluster.layer_studies import LayerResult, LayerStudies, RedistributionSettings

# One verdict after the other as a model is read: every layer alone, then thirds, then all.
_PRUNING_ORDER = ("together", "all", "first", "where", "share", "criterion", "order", "draw", "document")


def make_studies(
    folder: RunFolder, config: AuditConfig, model: str, metrics: pa.Table | None
) -> dict[str, pa.Table | str]:
    """The results of every study that the specification asks for, by the name of their file: tables and texts.

    ``model``: what cells call it. ``metrics``: the run's table of them; None where they were given up.
    """
    studies = config.studies
    results: dict[str, pa.Table | str] = {}
    overall = None if metrics is None else metrics.filter(pc.is_null(metrics["domain"])).to_pandas()
    work = LayerStudies(
        url=folder.url,
        model=model,
        metrics=overall,
        question=None if studies.importance is None else _question(studies.importance, config.seed, overall),
        progressive=None if studies.progressive is None else _progressive(studies.progressive, config.seed),
        redistribution=RedistributionSettings(scope=config.scope, seed=config.seed) if studies.redistribution else None,
    )
    if work.question is not None or work.progressive is not None or work.redistribution is not None:
        layers = _per_layer(folder, work)
        if work.question is not None:
            results |= _importance_results([study for layer in layers for study in layer.importance], work.question)
        results |= _joined(progressive=[layer.progressive for layer in layers], areas=[layer.areas for layer in layers])
        results |= _redistribution_results(layers)
    if studies.redundancy is not None and folder.files("pruning"):
        settings = RedundancySettings(
            margin=studies.redundancy.margin, bootstrap_draws=studies.redundancy.bootstrap_draws, seed=config.seed
        )
        found = redundancy_tables(_prunings_of(folder), settings)
        results["redundancy.parquet"] = _arrow(found.criteria)
        results["redundancy_verdicts.parquet"] = _arrow(found.verdicts)
    return results


def _importance_results(studies: list[LayerStudy], question: Question) -> dict[str, pa.Table | str]:
    if not studies:
        return {}
    tables = importance_tables(studies, question)
    results: dict[str, pa.Table | str] = {f"{name}.parquet": _arrow(table) for name, table in tables.items()}
    results["cells.csv"] = tables["cells"].to_csv(index=False, lineterminator="\n")
    results["findings.md"] = f"{findings(tables['cells'], question.settings)} {null_rates(tables['controls'])}\n"
    return results


def _redistribution_results(layers: list[LayerResult]) -> dict[str, pa.Table | str]:
    measured = [layer.redistribution for layer in layers if layer.redistribution is not None]
    if not measured:
        return {}
    results = _joined(redistribution=measured, weight_and_gap=[layer.weight_and_gap for layer in layers])
    return results | {"gap_depth.parquet": _arrow(depth_profile(pd.concat(measured)))}


def _question(config: ImportanceConfig, seed: int, metrics: pd.DataFrame | None) -> Question:
    # Both load torch, which whoever imports a run does without.
    from audit.observations.registry import find_metric  # noqa: PLC0415
    from audit.published.released_code import METRICS as RELEASED  # noqa: PLC0415

    names = None  # every metric there is, those of the released code too
    if config.metrics != "all":
        found = set() if metrics is None else set(metrics["metric"])  # those of the released code may be given up
        names = (*dict.fromkeys(find_metric(name).name for name in config.metrics), *sorted(found & set(RELEASED)))
    return Question(
        metrics=names,
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


def _per_layer(folder: RunFolder, work: LayerStudies) -> list[LayerResult]:
    """What ``work`` makes of every layer, in order; each layer is a task of its own."""
    layers = sorted(pc.unique(folder.dataset("effects").to_table(columns=["layer"])["layer"]).to_pylist())
    items = ray.data.from_items([{"layer": layer} for layer in layers], override_num_blocks=len(layers))
    rows = sorted(items.map(work).take_all(), key=lambda row: int(row["layer"]))
    return [ray.cloudpickle.loads(row["result"]) for row in rows]


def _prunings_of(folder: RunFolder) -> pa.Table:
    """The pruning table without ``layers``, in an order that does not depend on who wrote it when."""
    frame: pd.DataFrame = folder.dataset("pruning").to_table().to_pandas()
    words = ("where", "criterion", "order")
    frame = frame.assign(
        together=~frame["where"].astype(str).str.startswith("layer "),
        all=frame["where"].astype(str).eq("all layers"),
        first=[layers[0] for layers in frame["layers"]],
        **{name: frame[name].astype(str) for name in words},
    )
    frame = frame.sort_values(list(_PRUNING_ORDER), ignore_index=True)
    return _arrow(frame.drop(columns=["together", "all", "first", "layers"]))


def _joined(**parts: Iterable[pd.DataFrame | None]) -> dict[str, pa.Table | str]:
    """The layers' tables put together, by file; none where no layer has one."""
    there = {name: [table for table in tables if table is not None] for name, tables in parts.items()}
    return {f"{name}.parquet": _arrow(pd.concat(tables, ignore_index=True)) for name, tables in there.items() if tables}


def _arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)
