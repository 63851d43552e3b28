"""Generated runs: effect tables of a chosen size in the shape of a real audit, written without a model.

An audit of ``zero`` on every active expert: 16 layers, 64 experts, top-8, sequences of 256 audited tokens; every
sixteenth sequence has identity rows and repeats. Effects are log-normal, with a part that follows the expert, so that
they compress and tie as little as measured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from audit.config import AuditConfig
from audit.effects import EFFECTS
from audit.runfolder import Manifest, RunFolder

LAYERS, EXPERTS, TOP_K, TOKENS, IDENTITY_EVERY = 16, 64, 8, 256, 16
SEQUENCES_PER_FILE = 32  # a task each: a commit of about a million rows
_WORDS = {"unit": ("expert", "identity"), "intervention": ("zero", "scale"), "target": ("each",), "scope": ("token",)}


@dataclass(frozen=True, slots=True)
class Layout:
    """``by_layer``: a row group per layer, as the committer writes; otherwise task after task."""

    by_layer: bool = True


def task_tables(sequence: int, seed: int = 0) -> list[pa.Table]:
    """The effects of one task, a table per layer."""
    random = np.random.default_rng([seed, sequence])
    strength_E = np.random.default_rng(seed).normal(-3, 1, EXPERTS)
    return [_layer_table(layer, sequence, random, strength_E) for layer in range(LAYERS)]


def _layer_table(layer: int, sequence: int, random: np.random.Generator, strength_E: NDArray[np.float64]) -> pa.Table:
    checked = sequence % IDENTITY_EVERY == 0
    expert_TK = np.argpartition(random.random((TOKENS, EXPERTS)), TOP_K, axis=1)[:, :TOP_K]
    weight_TK = -np.sort(-random.dirichlet(np.ones(TOP_K), TOKENS), axis=1)
    effects = TOKENS * TOP_K
    rows = effects + TOKENS * checked
    identity = np.arange(rows) >= effects
    position = np.concatenate([np.repeat(np.arange(TOKENS), TOP_K), np.arange(TOKENS)])[:rows]
    size = np.exp(random.normal(0, 1.5, rows))
    size[:effects] *= 10.0 ** strength_E[expert_TK.ravel()] * weight_TK.ravel()
    size[effects:] *= 1e-7
    last = position == TOKENS - 1
    loss = size * random.normal(size=rows)
    columns: dict[str, Any] = {
        "document": np.full(rows, sequence // 4),
        "sequence": np.full(rows, sequence),
        "position": position,
        "layer": np.full(rows, layer),
        "unit": identity.astype(np.int8),
        "expert": pa.array(np.resize(expert_TK.ravel(), rows), mask=identity),
        "slot": pa.array(np.resize(np.tile(np.arange(TOP_K), TOKENS), rows), mask=identity),
        "intervention": identity.astype(np.int8),
        "target": pa.array(np.zeros(rows, np.int8), mask=identity),
        "parameter": pa.array(np.ones(rows), mask=~identity),
        "scope": np.zeros(rows, np.int8),
        "routing_weight": np.resize(weight_TK.ravel(), rows),
        "contribution_norm": size * 3,
        "gap_norm": size * 2,
        "delta_loss": pa.array(loss, mask=last),
        "kl": size,
        "js": size / 4,
        "tv": np.sqrt(size / 2).clip(max=1),
        "top1_flip": size > 0.05,
        "delta_logit": pa.array(-loss * 1.5, mask=last),
        "repeated": np.zeros(rows, bool),
    }
    if checked:  # one effect per token
        repeated = np.zeros(rows, bool)
        repeated[np.arange(TOKENS) * TOP_K + random.integers(TOP_K, size=TOKENS)] = True
        columns["repeated"] = repeated
        for name in ("delta_loss", "kl", "js", "tv", "delta_logit"):
            value = np.asarray(
                columns[name].to_numpy(zero_copy_only=False) if name.startswith("delta") else columns[name]
            )
            again = value + 1e-7 * random.normal(size=rows)
            columns[f"repeat_{name}"] = pa.array(again, mask=~repeated | np.isnan(again))
    return pa.table([_column(columns, field, rows) for field in EFFECTS], schema=EFFECTS)


def _column(columns: Mapping[str, Any], field: pa.Field, rows: int) -> pa.Array:
    if field.name not in columns:
        return pa.nulls(rows, field.type)
    if field.name in _WORDS:
        return pa.DictionaryArray.from_arrays(pa.array(columns[field.name], pa.int8()), list(_WORDS[field.name]))
    return pa.array(columns[field.name]).cast(field.type)


def write_commit(url: str, layout: Layout, number: int) -> int:
    """One commit of the run at ``url``: a Parquet file and its manifest. Returns how many rows it has."""
    first = number * SEQUENCES_PER_FILE
    tables = [task_tables(sequence) for sequence in range(first, first + SEQUENCES_PER_FILE)]
    name = f"effects/c-{number:06d}/0.parquet"
    path = Path(url, name)
    path.parent.mkdir(parents=True)
    words = [field.name for field in EFFECTS if not pa.types.is_floating(field.type)]  # floats hardly ever repeat
    with pq.ParquetWriter(path, EFFECTS, compression="zstd", use_dictionary=words) as writer:
        if layout.by_layer:
            for layer in range(LAYERS):
                writer.write_table(pa.concat_tables(table[layer] for table in tables))
        else:
            writer.write_table(pa.concat_tables(part for table in tables for part in table))
    receipts = {
        f"effects-{first + i:08d}": {
            "rows": {"effects": sum(map(len, parts))},
            "routing_changes": {layer: (TOKENS, 0) for layer in range(LAYERS) if (first + i) % IDENTITY_EVERY == 0},
        }
        for i, parts in enumerate(tables)
    }
    RunFolder(url).commit(Manifest(f"c-{number:06d}", "generated", receipts, {"effects": [name]}))
    return sum(len(part) for table in tables for part in table)


def write_run(folder: Path, rows: int, studies: Mapping[str, Any] | None = None, layout: Layout | None = None) -> int:
    """A run folder with at least ``rows`` effects whose specification asks for ``studies``; returns how many it has."""
    folder.mkdir(parents=True)
    specification = AuditConfig.parse({"studies": studies or {}}, folder).resolved()
    RunFolder(str(folder)).begin({"specification": specification, "model": {"source": "generated"}})
    _write_metrics(folder)
    per_commit = SEQUENCES_PER_FILE * LAYERS * TOKENS * (TOP_K + 1 / IDENTITY_EVERY)
    commits = range(int(-(-rows // per_commit)))
    with ProcessPoolExecutor() as pool:
        return sum(pool.map(partial(write_commit, str(folder), layout or Layout()), commits))


def _write_metrics(folder: Path) -> None:
    """Three metrics of every expert, in a commit of their own."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        [
            {
                "domain": None, "layer": layer, "expert": expert, "n": 1000, "metric": metric,
                "value": random.random(), "error_bound": 0.0, "orientation": 1, "label": "extended",
            }
            for metric in ("reap", "ean", "utilization")
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        ]
    )  # fmt: skip
    name = "observations/merge/metrics.parquet"
    (folder / name).parent.mkdir(parents=True)
    schema = pa.Schema.from_pandas(frame, preserve_index=False)
    schema = schema.set(0, pa.field("domain", pa.string()))
    pq.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False), folder / name)
    receipt = {"rows": {}, "folder": "observations/merge", "metrics": name}
    manifest = Manifest("c-calibration", "generated", {"merge-calibration": receipt}, {"observations": [name]})
    RunFolder(str(folder)).commit(manifest)
