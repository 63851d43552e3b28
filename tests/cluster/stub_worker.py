"""A worker without a model: tables of the public schemas from a seeded generator, and faults on demand."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from audit.effects import EFFECTS, TOKENS
from cluster.driver import Policy
from cluster.run import Job
from cluster.tasks import Task
from cluster.worker import Output

LAYERS, EXPERTS, TOP_K = (1, 3), 6, 2
Fault = Literal["raise", "kill", "hang"]


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong, by task id and attempt (0: at every attempt)."""

    faults: Mapping[tuple[str, int], Fault] = field(default_factory=dict)

    def strike(self, task: str, attempt: int) -> None:
        fault = self.faults.get((task, attempt)) or self.faults.get((task, 0))
        if fault == "raise":
            raise RuntimeError(f"{task} was told to fail")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)


def _table(columns: Mapping[str, object], rows: int, schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(columns[f.name]).cast(f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def tables(task: Task) -> dict[str, pa.Table]:
    """Two active experts and one identity row per position and layer; the last position has no next token."""
    random = np.random.default_rng(zlib.crc32(task.id.encode()))
    sequence = int(task.id.rpartition("-")[2])
    positions = np.asarray(task.positions[0])
    position, layer, slot = (a.ravel() for a in np.meshgrid(positions, LAYERS, np.arange(TOP_K + 1), indexing="ij"))
    n, identity = len(position), slot == TOP_K
    size = np.where(identity, 1e-7, 10.0 ** random.normal(-3, 2, n))
    loss = np.where(position == positions[-1], np.nan, size * random.normal(size=n))
    effects = {
        "document": np.full(n, sequence // 2),
        "sequence": np.full(n, sequence),
        "position": position,
        "layer": layer,
        "unit": np.where(identity, "identity", "expert"),
        "expert": pa.array(random.integers(EXPERTS, size=n), mask=identity),
        "slot": pa.array(slot, mask=identity),
        "intervention": np.where(identity, "scale", "zero"),
        "target": pa.array(["each"] * n, mask=identity),
        "scope": ["token"] * n,
        "parameter": pa.array(np.ones(n), mask=~identity),
        "routing_weight": random.random(n),
        "contribution_norm": random.random(n),
        "gap_norm": size,
        "delta_loss": pa.array(loss, from_pandas=True),
        "kl": size,
        "js": size / 4,
        "tv": np.sqrt(size / 2).clip(max=1),
        "top1_flip": size > 1e-2,
        "delta_logit": pa.array(-loss, from_pandas=True),
    }
    m = len(positions)
    tokens = {
        "document": [sequence // 2] * m,
        "sequence": [sequence] * m,
        "position": positions,
        "sentence": [0] * m,
        "domain": ["prose"] * m,
        "token_id": random.integers(100, size=m),
        "target_id": pa.array(positions, mask=positions == positions[-1]),
        "baseline_entropy": random.random(m),
    }
    return {"effects": _table(effects, n, EFFECTS), "tokens": _table(tokens, m, TOKENS)}


@dataclass(frozen=True)
class StubWorker:
    folder: str
    plan: FaultPlan = FaultPlan()
    seconds: float = 0.0

    def run(self, task: Task, attempt: int) -> Output:
        self.plan.strike(task.id, attempt)
        time.sleep(self.seconds)
        if task.kind == "measure":
            return Output(
                {"routing_changes": {layer: (len(task.positions[0]), int(layer == 3)) for layer in LAYERS}},
                tables(task),
            )
        name = f"observations/{task.id}-{os.getpid()}-{attempt}"
        target = Path(self.folder, name)
        target.mkdir(parents=True)
        read = (
            [Path(self.folder, part, "sum").read_text() for part in task.inputs] if task.kind == "merge" else [task.id]
        )
        (target / "sum").write_text("+".join(read))
        return Output({"folder": name})


def make_job(
    *,
    tasks: int = 9,
    positions: int = 5,
    replicas: int = 2,
    plan: FaultPlan | None = None,
    seconds: float = 0.0,
    policy: Policy | None = None,
    calibration: int = 0,
    identity: Mapping[str, object] | None = None,
) -> Job:
    observe = [Task(id=f"observe-{i:04d}", kind="observe", rows=10, flops=10) for i in range(calibration)]
    merge = [Task(id="merge-calibration", kind="merge", inputs=tuple(t.id for t in observe))] if observe else []
    measure = [
        Task(
            id=f"effects-{i:04d}",
            kind="measure",
            positions=(np.arange(1, 1 + positions + i % 3),),
            layers=LAYERS,
            flops=1.0 + i % 3,
            rows=(TOP_K + 1) * len(LAYERS) * (positions + i % 3),
            inputs=tuple(t.id for t in merge),
        )
        for i in range(tasks)
    ]
    return Job(
        stages=(("observe", observe), ("merge", merge), ("effects", measure)),
        identity=identity or {"specification": {"seed": 0}},
        information={"specification": {}, "model": {"source": "stub"}},
        make_worker=partial(StubWorker, plan=plan or FaultPlan(), seconds=seconds),
        replicas=replicas,
        policy=policy or Policy(commit_results=4, relaunch_seconds=0.0),
    )


def rows_of(tables_: Sequence[pa.Table]) -> list[tuple[object, ...]]:
    """Rows as sorted tuples, to compare tables whose order has no meaning."""
    return sorted((tuple(row.values()) for table in tables_ for row in table.to_pylist()), key=repr)
