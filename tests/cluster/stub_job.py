"""The stub worker's job, and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from stub_worker import FaultPlan, StubWorker

from benchmarks.faults.trial import LAYERS, TOP_K
from cluster.driver.driver import Policy
from cluster.driver.group import Shape
from cluster.driver.scaling import Scale
from cluster.run import Job
from cluster.tasks import Task


def make_job(
    *,
    tasks: int = 9,
    positions: int = 5,
    groups: int = 2,
    ranks: int = 1,
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
        scale=Scale(max_groups=groups),
        shape=Shape(ranks=ranks),
        policy=policy or Policy(commit_results=4, relaunch_seconds=0.0),
    )


def rows_of(tables_: Sequence[pa.Table]) -> list[tuple[object, ...]]:
    """Rows as sorted tuples, to compare tables whose order has no meaning."""
    return sorted((tuple(row.values()) for table in tables_ for row in table.to_pylist()), key=repr)
