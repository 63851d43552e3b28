"""The studies of a run, made layer by layer on Ray from what was committed; what they compute is in audit.studies.

A task holds what one study needs of one layer, and says how much memory that takes; the pairs behind pooled lines stay
in Ray's object store, which writes to disk what memory does not hold: 8 bytes per (token, layer, metric, outcome,
intervention) and 16 per (token, layer, metric, intervention). Layers are put together in order: any number of workers
gives the same bytes. A study whose tasks were all given up has no table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray

from audit.config import AuditConfig
from audit.config.studies import ImportanceConfig, ProgressiveConfig
from audit.interventions import COUNTED
from audit.runfolder import RunFolder
from audit.statistics.cells import Settings
from audit.statistics.pooled import pooled_table
from audit.studies.findings import findings, null_rates
from audit.studies.importance import CandidateStudy, Question
from audit.studies.importance_tables import row_tables
from audit.studies.progressive import ProgressiveSettings
from audit.studies.redistribution import depth_profile
from audit.studies.redundancy import RedundancySettings, redundancy_tables
from cluster.results import layer_tasks
from cluster.results.layer_rows import EffectFiles
from cluster.results.layer_studies import LayerLines, LayerStudies, RedistributionSettings, What, pooled_rows

# Bytes a task takes beside its worker per effect that it is about, measured and rounded up: docs/scale.md.
_IMPORTANCE_BYTES, _CONTRAST_BYTES, _POOLED_BYTES = 700, 1200, 80
_PROGRESSIVE_BYTES, _REDISTRIBUTION_BYTES = 500, 400
_CONTRAST_ROWS = 1 << 20  # of a row group of the table of contrasts
# One verdict after the other as a model is read: every layer alone, then thirds, then all.
_PRUNING_ORDER = ("together", "all", "first", "where", "share", "criterion", "order", "draw", "document")


Results = dict[str, pa.Table | str | Iterator[pa.Table]]
"""By the name of their file; a table too large to hold comes in parts."""


def make_studies(
    folder: RunFolder,
    files: EffectFiles,
    config: AuditConfig,
    model: str,
    metrics: pa.Table | None,
    layers: pa.Table,
    floor: pa.Table,
) -> Results:
    """The results of every study that the specification asks for, by the name of their file: tables and texts.

    ``model``: what cells call it. ``metrics``: the run's table of them; None where they were given up. ``layers`` and
    ``floor``: the summaries of ``files``, which say what there is to study. Raises RunError.
    """
    studies = config.studies
    results: Results = {}
    overall = None if metrics is None else metrics.filter(pc.is_null(metrics["domain"])).to_pandas()
    work = LayerStudies(
        files=files,
        model=model,
        metrics=overall,
        question=None if studies.importance is None else _question(studies.importance, config.seed, overall),
        progressive_settings=None if studies.progressive is None else _progressive(studies.progressive, config.seed),
        redistribution_settings=RedistributionSettings(scope=config.scope, seed=config.seed)
        if studies.redistribution
        else None,
    )
    cells = layers.to_pandas()
    if work.question is not None and work.metrics is not None:
        noise = floor.to_pandas().groupby(["layer", "scope"])["rows"].max().to_dict()
        results |= _importance(work, work.question, cells, noise)
    if work.progressive_settings is not None:
        results |= _progressive_results(work, cells)
    if work.redistribution_settings is not None:
        results |= _redistribution_results(work, cells, config.scope)
    if studies.redundancy is not None and folder.files("pruning"):
        settings = RedundancySettings(
            margin=studies.redundancy.margin, bootstrap_draws=studies.redundancy.bootstrap_draws, seed=config.seed
        )
        found = redundancy_tables(_prunings_of(folder), settings)
        results["redundancy.parquet"] = _arrow(found.criteria)
        results["redundancy_verdicts.parquet"] = _arrow(found.verdicts)
    return results


# The importance audit -------------------------------------------------------------------------------------------------


def _importance(
    work: LayerStudies, question: Question, cells: pd.DataFrame, noise: Mapping[tuple[int, str], int]
) -> Results:
    """``noise``: identity rows by layer and scope."""
    shared = ray.put(work)
    single = cells[cells["unit"] == "expert"]
    running: list[tuple[int, What, int, Any]] = []
    keys = ["layer", "intervention", "parameter", "scope"]
    for row in single.groupby(keys, dropna=False, sort=True)["n"].sum().reset_index().to_dict("records"):
        layer, size = int(row["layer"]), int(row["n"])
        parameter = None if np.isnan(row["parameter"]) else float(row["parameter"])
        what = What(str(row["intervention"]), parameter, str(row["scope"]))
        each = _IMPORTANCE_BYTES + (_CONTRAST_BYTES if question.contrasts else 0)
        memory = layer_tasks.WORKER_BYTES + each * (size + noise.get((layer, what.scope), 0))
        name = f"importance of layer {layer}, {what.name}, {what.scope}"
        answers = layer_tasks.start_many(name, LayerStudies.importance, shared, layer, what, memory=memory)
        running.append((layer, what, size, answers))
    if not running:
        return {}
    studies: list[CandidateStudy] = []
    lines: dict[tuple[str, What], dict[int, Any]] = {}
    contrasts: dict[tuple[object, ...], Any] = {}
    for layer, what, _, answers in running:
        *pairs, last = answers
        (found,) = layer_tasks.results([last])
        studies += found
        candidates = [study for study in found if study.correlations]
        if question.contrasts:
            for study, ref in zip(candidates, pairs[1::2], strict=True):
                cells_of = [(layer, row["metric"], row["outcome"], what.name, what.scope) for row in study.correlations]
                contrasts |= dict.fromkeys(cells_of, ref)
            pairs = pairs[::2]
        for study, ref in zip(candidates, pairs, strict=True):
            lines.setdefault((study.candidate, what), {})[layer] = ref
    largest = max(size for _, _, size, _ in running)
    pooled = _pooled(lines, question.settings, layer_tasks.WORKER_BYTES + _POOLED_BYTES * largest)
    tables = row_tables(studies, question) | {"pooled": pooled}
    results: Results = {f"{name}.parquet": _arrow(table) for name, table in tables.items()}
    if question.contrasts:
        results["contrasts.parquet"] = _contrasts(contrasts)
    results["cells.csv"] = tables["cells"].to_csv(index=False, lineterminator="\n")
    results["findings.md"] = f"{findings(tables['cells'], question.settings)} {null_rates(tables['controls'])}\n"
    return results


def _pooled(lines: Mapping[tuple[str, What], Mapping[int, Any]], settings: Settings, memory: int) -> pd.DataFrame:
    tasks = [
        layer_tasks.start(
            f"pooled {name}, {what.name}, {what.scope}",
            pool,
            [layers[layer] for layer in sorted(layers)],
            settings,
            memory=memory,
        )
        for (name, what), layers in lines.items()
    ]
    return pooled_table(row for rows in layer_tasks.results(tasks) for row in rows)


def pool(refs: Sequence[Any], settings: Settings) -> list[dict[str, Any]]:
    """A candidate's pooled lines, as a worker makes them of the layers' :class:`LayerLines`, ascending."""
    return pooled_rows([partial(_fetch, ref) for ref in refs], settings)


def _fetch(ref: Any) -> LayerLines:
    lines: LayerLines = ray.get(ref)
    return lines


def _contrasts(refs: Mapping[tuple[object, ...], Any]) -> Iterator[pa.Table]:
    """The table of contrasts in its order, a row group at a time; ``refs``: by ``CELL`` without the model, the tables
    by outcome that hold the cell's.
    """
    held: list[pa.Table] = []
    empty = None
    for cell in sorted(refs):
        _, _, outcome, *_ = cell
        table = ray.get(refs[cell])[outcome]
        if not len(table):  # has no values to have types of
            empty = table
            continue
        held.append(table)
        if sum(map(len, held)) >= _CONTRAST_ROWS:
            gathered = pa.concat_tables(held)
            whole = len(gathered) // _CONTRAST_ROWS * _CONTRAST_ROWS
            yield gathered.slice(0, whole).combine_chunks()
            held = [gathered.slice(whole)]
    if held or empty is not None:
        yield pa.concat_tables(held).combine_chunks() if held else empty


# Single layers --------------------------------------------------------------------------------------------------------


def _progressive_results(work: LayerStudies, cells: pd.DataFrame) -> Results:
    removals = cells[
        (cells["unit"] == "set")
        & (cells["intervention"] == "zero")
        & cells["target"].astype(str).str.startswith(COUNTED)
    ]
    found = _of_layers("progressive ablation", LayerStudies.progressive, work, removals, _PROGRESSIVE_BYTES)
    return _joined(progressive=[curves for curves, _ in found], areas=[areas for _, areas in found])


def _redistribution_results(work: LayerStudies, cells: pd.DataFrame, scope: str) -> Results:
    single = cells[(cells["unit"] == "expert") & (cells["intervention"] == "zero") & (cells["scope"] == scope)]
    found = _of_layers("redistribution", LayerStudies.redistribution, work, single, _REDISTRIBUTION_BYTES)
    measured = [tables for tables in found if tables is not None]
    if not measured:
        return {}
    layers, gaps = [table for table, _ in measured], [table for _, table in measured]
    results = _joined(redistribution=layers, weight_and_gap=gaps)
    return results | {"gap_depth.parquet": _arrow(depth_profile(pd.concat(layers)))}


def _of_layers(
    study: str, function: Callable[..., Any], work: LayerStudies, cells: pd.DataFrame, row_bytes: int
) -> list[Any]:
    """What ``function`` makes of every layer of ``cells``, in order; each layer is a task of its own."""
    shared = ray.put(work)
    tasks = []
    for row in cells.groupby("layer", sort=True)["n"].sum().reset_index().to_dict("records"):
        memory = layer_tasks.WORKER_BYTES + row_bytes * int(row["n"])
        tasks.append(
            layer_tasks.start(f"{study} of layer {row['layer']}", function, shared, row["layer"], memory=memory)
        )
    return layer_tasks.results(tasks)


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


def _joined(**parts: Sequence[pd.DataFrame]) -> Results:
    """The layers' tables put together, by file; none where no layer has one."""
    return {f"{name}.parquet": _arrow(pd.concat(tables, ignore_index=True)) for name, tables in parts.items() if tables}


def _arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)
