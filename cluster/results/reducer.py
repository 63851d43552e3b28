"""The reducer: committed effects in, result tables out; layer by layer on Ray, in bounded memory.

A layer is a task. It reads its rows a batch at a time, twice: once for the noise floor, whose quantiles are taken of
all values, once for sums, which are exact (``audit.studies.summary``). Layers are put together in order, so that the
tables are the same to the last bit for any number of groups, any order of completion and any cut into files.
docs/scale.md says how much memory a task takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from audit.config import AuditConfig
from audit.runfolder import Manifest, RunFolder
from audit.studies import summary
from cluster.results import layer_tasks
from cluster.results.layer_rows import EffectFiles
from cluster.results.studies import Results, make_studies

_REDUCED = "reduced.json"  # written last: which tasks the results were made of
_SUMMED = [*summary.CELL, "expert", *(name for name in summary.AVERAGED if name != "abs_delta_loss")]
_NOISE = ["layer", "unit", "scope", "repeated", *summary.NOISY]
_FILES_PER_TASK = 64  # of the search for layers
_MERGE_ROWS = 500_000  # partial sums that may gather before they are merged
# Of a task that sums a layer: beside the worker, a batch with what is computed of it, and every noise value.
_SUMMARY_BYTES, _NOISE_BYTES = 256 * layer_tasks.MIB, 80


def fingerprint(folder: RunFolder) -> str:
    """Hash of the committed tasks: results that carry another one are out of date."""
    return hashlib.sha256("\n".join(sorted(folder.done())).encode()).hexdigest()


def is_reduced(folder: RunFolder) -> bool:
    """Whether results/ is whole and made from exactly what is committed; without effects there is nothing to make."""
    if not folder.files("effects"):
        return True
    text = folder.read_result(_REDUCED)
    if text is None:
        return False
    found, there = json.loads(text), folder.list_files("results")
    return found["tasks"] == fingerprint(folder) and all(f"results/{name}" in there for name in found["results"])


def reduce(folder: RunFolder, tell_floor: Callable[[pa.Table], None] = lambda floor: None) -> list[str]:
    """Write every result of what is committed into results/, and return their names: layers, experts and noise_floor of
    every effect, metrics of what was observed of the experts, and what the studies of the specification give.

    ``tell_floor`` is told the noise floor before the studies begin. Raises RunError where no node holds what one task
    needs; results that need less are written before that.
    """
    files = EffectFiles(folder.url, folder.files("effects"))
    summed = _summaries(files, _routing_changes(folder.manifests()))
    layers = pa.concat_tables(found.layers for found in summed).combine_chunks()
    floor = pa.concat_tables(found.floor for found in summed).combine_chunks()
    tell_floor(floor)
    results: Results = {
        "layers.parquet": layers,
        "experts.parquet": pa.concat_tables(found.experts for found in summed).combine_chunks(),
        "noise_floor.parquet": floor,
    }
    observed = _metrics(folder)
    if observed is not None:
        results["metrics.parquet"] = observed
        observed = pa.concat_tables([observed, *_released(folder)], promote_options="permissive")
    names = _write(folder, results)
    run = folder.require_run()
    config = AuditConfig.parse(run["specification"], Path())
    names += _write(folder, make_studies(folder, files, config, str(run["model"]["source"]), observed, layers, floor))
    folder.write_result(_REDUCED, json.dumps({"tasks": fingerprint(folder), "results": sorted(names)}) + "\n")
    return sorted(names)


def _write(folder: RunFolder, results: Results) -> list[str]:
    for name, result in results.items():
        if isinstance(result, str):
            folder.write_result(name, result)
        else:
            folder.write_table(name.removesuffix(".parquet"), result)
    return list(results)


@dataclass(frozen=True, slots=True, eq=False)
class LayerSummary:
    """The rows of one layer in three of the result tables."""

    layers: pa.Table
    experts: pa.Table
    floor: pa.Table


def summarize(files: EffectFiles, layer: int, routing_changes: Sequence[int] | None) -> LayerSummary:
    """What a worker makes of one layer; ``routing_changes``: its identity rows, those routed otherwise above."""
    values = [summary.noise_values(rows) for rows in files.batches(layer, _NOISE)]
    floor = summary.noise_floor(values, [] if routing_changes is None else [{layer: routing_changes}])
    del values
    partials: list[pa.Table] = []
    for rows in files.batches(layer, _SUMMED):
        partials.append(summary.partial_sums(rows, floor))
        if sum(map(len, partials)) > _MERGE_ROWS:
            partials = [summary.merge(partials)]
    merged = summary.merge(partials)
    return LayerSummary(summary.layer_summary(merged), summary.expert_summary(merged), floor)


def _summaries(files: EffectFiles, routing_changes: dict[int, np.ndarray]) -> list[LayerSummary]:
    parts = [
        EffectFiles(files.url, files.paths[i : i + _FILES_PER_TASK])
        for i in range(0, len(files.paths), _FILES_PER_TASK)
    ]
    reading = layer_tasks.WORKER_BYTES
    found = layer_tasks.results(
        [layer_tasks.start("layers", EffectFiles.layers, part, memory=reading) for part in parts]
    )
    files_ref = ray.put(files)
    tasks = []
    for layer in sorted(set[int]().union(*found)):
        changes = routing_changes.get(layer)
        noise = 0 if changes is None else 2 * int(changes[0])  # an identity row and a repeat of the same token
        memory = layer_tasks.WORKER_BYTES + _SUMMARY_BYTES + _NOISE_BYTES * noise
        tasks.append(layer_tasks.start(f"layer {layer}", summarize, files_ref, layer, changes, memory=memory))
    return list(layer_tasks.results(tasks))


def _routing_changes(manifests: Iterable[Manifest]) -> dict[int, np.ndarray]:
    """Per layer: identity rows, and those whose expert sets changed above."""
    found: dict[int, np.ndarray] = {}
    for manifest in manifests:
        for receipt in manifest.tasks.values():
            for layer, counts in receipt.get("routing_changes", {}).items():
                found[int(layer)] = found.get(int(layer), np.zeros(2, np.int64)) + np.asarray(counts, np.int64)
    return found


def _metrics(folder: RunFolder) -> pa.Table | None:
    """The metrics of the audited documents where these were observed (``calibration.from``), else of the
    calibration.
    """
    receipts = folder.done()
    for task in ("merge-audited", "merge-calibration"):
        if "metrics" in receipts.get(task, {}):
            return _read(folder, str(receipts[task]["metrics"]))
    return None


def _released(folder: RunFolder) -> list[pa.Table]:
    """The metrics as the released code computed them, where they were asked for; one over all domains."""
    tables = [_read(folder, str(receipt["released"])) for receipt in folder.done().values() if "released" in receipt]
    return [table.append_column("domain", pa.nulls(table.num_rows, pa.string())) for table in tables]


def _read(folder: RunFolder, name: str) -> pa.Table:
    return pq.read_table(folder.path(name), filesystem=folder.arrow_filesystem())
