"""The reducer: committed effects in, result tables out, through Ray Datasets; memory holds one block and the sums.

Sums are exact and quantiles are taken of all values (``audit.studies.summary``): the tables are the same to the last
bit for any number of replicas, any order of completion and any cut into files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from audit.runfolder import RunFolder
from audit.studies import summary

RESULTS = ("layers", "experts", "noise_floor")  # and metrics, where the experts were observed


def fingerprint(folder: RunFolder) -> str:
    """Hash of the committed tasks: results that carry another one are out of date."""
    return hashlib.sha256("\n".join(sorted(folder.done())).encode()).hexdigest()


def is_reduced(folder: RunFolder) -> bool:
    """Whether results/ was made from exactly what is committed; without any effects there is nothing to make."""
    if not folder.files("effects"):
        return True
    try:
        return all(
            (folder.read_table(name).schema.metadata or {}).get(b"tasks") == fingerprint(folder).encode()
            for name in RESULTS
        )
    except FileNotFoundError:
        return False


def reduce(folder: RunFolder) -> None:
    """Write results/layers.parquet, experts.parquet and noise_floor.parquet from every committed effect, and
    metrics.parquet from what was observed of the experts.
    """
    manifests = folder.manifests()
    changes = [
        receipt["routing_changes"]
        for manifest in manifests
        for receipt in manifest.tasks.values()
        if "routing_changes" in receipt
    ]
    floor = summary.noise_floor(
        _mapped(folder, summary.noise_values, ["layer", "unit", "scope", *summary.COMPARED]), changes
    )
    outcomes = [name for name in summary.AVERAGED if name != "abs_delta_loss"]
    merged = summary.merge(
        _mapped(folder, lambda table: summary.partial_sums(table, floor), [*summary.CELL, "expert", *outcomes])
    )
    tables = {"layers": summary.layer_summary(merged), "experts": summary.expert_summary(merged), "noise_floor": floor}
    assert set(tables) == set(RESULTS)
    observed = _metrics(folder)
    if observed is not None:
        tables["metrics"] = observed
    for name, table in tables.items():
        folder.write_table(name, table.replace_schema_metadata({"tasks": fingerprint(folder)}))


def _metrics(folder: RunFolder) -> pa.Table | None:
    """The metrics of the audited documents where these were observed (``calibration.from``), else of the
    calibration.
    """
    receipts = folder.done()
    for task in ("merge-audited", "merge-calibration"):
        path = receipts.get(task, {}).get("metrics")
        if path is not None:
            return pq.read_table(folder.path(str(path)), filesystem=folder.arrow_filesystem())
    return None


def _mapped(folder: RunFolder, function: Callable[[pa.Table], pa.Table], columns: Sequence[str]) -> list[pa.Table]:
    """``function`` of every block of the committed effects."""
    dataset = ray.data.read_parquet(folder.files("effects"), filesystem=folder.arrow_filesystem()).select_columns(
        list(columns)
    )
    refs = dataset.map_batches(function, batch_format="pyarrow", batch_size=None).to_arrow_refs()
    return [ray.get(ref) for ref in refs]
