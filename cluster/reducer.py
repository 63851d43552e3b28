"""The reducer: committed effects in, result tables out, through Ray Datasets; memory holds one block and the sums.

Sums are exact and quantiles are taken of all values (``audit.studies.summary``): the tables are the same to the last
bit for any number of replicas, any order of completion and any cut into files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from audit.config import AuditConfig
from audit.runfolder import RunFolder
from audit.studies import summary
from cluster.studies import make_studies

_REDUCED = "reduced.json"  # written last: which tasks the results were made of


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


def reduce(folder: RunFolder) -> list[str]:
    """Write every result of what is committed into results/, and return their names: layers, experts and noise_floor of
    every effect, metrics of what was observed of the experts, and what the studies of the specification give.
    """
    manifests = folder.manifests()
    changes = [
        receipt["routing_changes"]
        for manifest in manifests
        for receipt in manifest.tasks.values()
        if "routing_changes" in receipt
    ]
    floor = summary.noise_floor(
        _mapped(folder, summary.noise_values, ["layer", "unit", "scope", "repeated", *summary.NOISY]), changes
    )
    outcomes = [name for name in summary.AVERAGED if name != "abs_delta_loss"]
    merged = summary.merge(
        _mapped(folder, lambda table: summary.partial_sums(table, floor), [*summary.CELL, "expert", *outcomes])
    )
    results: dict[str, pa.Table | str] = {
        "layers.parquet": summary.layer_summary(merged),
        "experts.parquet": summary.expert_summary(merged),
        "noise_floor.parquet": floor,
    }
    observed = _metrics(folder)
    if observed is not None:
        results["metrics.parquet"] = observed
        observed = pa.concat_tables([observed, *_released(folder)], promote_options="permissive")
    run = folder.require_run()
    config = AuditConfig.parse(run["specification"], Path())
    results |= make_studies(folder, config, str(run["model"]["source"]), observed)
    for name, result in results.items():
        if isinstance(result, str):
            folder.write_result(name, result)
        else:
            folder.write_table(name.removesuffix(".parquet"), result)
    folder.write_result(_REDUCED, json.dumps({"tasks": fingerprint(folder), "results": sorted(results)}) + "\n")
    return sorted(results)


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


def _mapped(folder: RunFolder, function: Callable[[pa.Table], pa.Table], columns: Sequence[str]) -> list[pa.Table]:
    """``function`` of every block of the committed effects."""
    dataset = ray.data.read_parquet(folder.files("effects"), filesystem=folder.arrow_filesystem()).select_columns(
        list(columns)
    )
    refs = dataset.map_batches(function, batch_format="pyarrow", batch_size=None).to_arrow_refs()
    return [ray.get(ref) for ref in refs]
