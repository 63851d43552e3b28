"""The worker that measures: one loaded model with its engine, one task after the other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import torch

from audit.calibration import Calibration
from audit.config import AuditConfig, ConfigError
from audit.engine import Engine
from audit.engine.validate import load
from audit.models import MoEModel
from audit.models.weights import weight_metrics
from audit.observations.reservoir import SIZE
from audit.studies.observed import metric_table
from cluster.tasks import Task
from cluster.worker import Output


def load_engine(config: AuditConfig, resolved: Mapping[str, Any] | None = None) -> tuple[MoEModel, Engine]:
    """The model and engine of a specification, with ``resolved`` in place of its ``auto`` where that is given.

    Weights come from the checkpoint's files, memory-mapped, so that the processes of a node share them.
    """
    torch.set_num_threads(config.engine.threads)
    chosen = resolved or {
        "experts": config.engine.experts,
        "linear": config.engine.linear,
        "method": config.engine.method,
        "device": config.model.device,
    }
    model = load(
        config.model.location(config.folder),
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=chosen["device"],
        trust_remote_code=config.model.trust_remote_code,
        allow_pickle=config.model.allow_pickle,
        experts=chosen["experts"],
        linear=chosen["linear"],
    )
    try:
        engine = Engine(
            model,
            memory=int(config.engine.memory),
            micro_batch=config.engine.micro_batch,
            identity_every=config.engine.identity_every,
            seed=config.seed,
            method=chosen["method"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model, engine


class EngineWorker:
    """Runs tasks of one specification; ``folder`` is the run folder's URL, ``domains`` those of the whole corpus."""

    def __init__(self, config: AuditConfig, resolved: Mapping[str, Any], domains: Sequence[str], folder: str) -> None:
        self._config, self._domains, self._folder = config, domains, folder
        _, self._engine = load_engine(config, resolved)
        self._calibration: tuple[str, Calibration] | None = None
        draws = any(intervention.kind == "resample" for intervention in config.build_interventions())
        self._stored_outputs = SIZE if draws else None

    def run(self, task: Task, attempt: int) -> Output:
        start = time.monotonic()
        output = self._measure(task) if task.kind == "measure" else self._save(task, attempt)
        return Output({**output.receipt, "seconds": round(time.monotonic() - start, 3)}, output.tables)

    def _measure(self, task: Task) -> Output:
        found = self._engine.measure(
            task.sequences,
            task.positions,
            layers=task.layers,
            interventions=task.interventions,
            scope=self._config.scope,
            all_positions=self._config.all_positions,
            calibration=self._load(task.inputs[0]) if task.inputs else None,
        )
        receipt = {
            "method": found.method,
            "micro_batch": found.micro_batch,
            "halvings": found.halvings,
            "skipped": found.skipped,
            "routing_changes": found.routing_changes,
        }
        return Output(receipt, {"effects": found.effects} | ({"tokens": found.tokens} if task.tokens else {}))

    def _save(self, task: Task, attempt: int) -> Output:
        """Observe or merge, into a folder of its own: a second attempt does not touch what a first one left."""
        if task.kind == "merge":
            calibration = Calibration.merge([Calibration.load(f"{self._folder}/{part}") for part in task.inputs])
        else:
            calibration = self._engine.observe(
                task.sequences, domains=self._domains, stored_outputs=self._stored_outputs
            )
        name = f"observations/{task.id}-{attempt}-{uuid.uuid4().hex[:8]}"
        calibration.save(f"{self._folder}/{name}")
        if task.kind != "merge":
            return Output({"folder": name})
        table = metric_table(calibration.observations, weight_metrics(self._engine.model))
        with fsspec.open(f"{self._folder}/{name}/metrics.parquet", "wb") as file:
            table.to_parquet(file, index=False)
        return Output({"folder": name, "metrics": f"{name}/metrics.parquet"})

    def _load(self, name: str) -> Calibration:
        if self._calibration is None or self._calibration[0] != name:
            self._calibration = (name, Calibration.load(f"{self._folder}/{name}").to(self._engine.model.device))
        return self._calibration[1]
