"""The worker that measures: one loaded model with its engine, one task after the other."""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from audit.calibration import Calibration
from audit.config import AuditConfig, ConfigError
from audit.engine import Engine
from audit.engine.cost import Sizes
from audit.engine.validate import load
from audit.models import MoEModel
from audit.models.shards.backends import open_shard
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.sources import resolve_device
from audit.models.weights import weight_metrics
from audit.observations.reservoir import SIZE
from audit.pruning import prune_table
from audit.published.released_code import padding_token, released_metrics_of_tokens
from audit.storage import Storage
from audit.studies.observed import metric_table, oriented
from cluster.driver.group import Place
from cluster.groups.checkpoint_cache import Checkpoint, fetch
from cluster.planning.identity import require_weights
from cluster.tasks import Task
from cluster.worker import Output


def load_audited(
    config: AuditConfig,
    resolved: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
    shard: ModelShard | None = None,
    inspect: Inspect | None = None,
) -> MoEModel:
    """The model of a specification, with ``resolved`` in place of its ``auto``, as ``shard`` holds it (None: whole).

    ``checkpoint``: what lies behind a ``model.source`` that is a URL; this machine's copy of it is loaded. Weights come
    from the checkpoint's files, memory-mapped, so that the processes of a node share them. ``inspect`` is called with
    the whole model before it is divided.
    """
    torch.set_num_threads(config.engine.threads)
    return load(
        config.model.location(config.folder),
        files=None if checkpoint is None else str(fetch(checkpoint)),
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=resolved["device"],
        trust_remote_code=config.model.trust_remote_code,
        allow_pickle=config.model.allow_pickle,
        experts=resolved["experts"],
        linear=resolved["linear"],
        shard=shard,
        inspect=inspect,
    )


def make_engine(config: AuditConfig, resolved: Mapping[str, Any], model: MoEModel) -> Engine:
    """The engine of a specification; that of the plan and those of all ranks cut work alike. Raises ConfigError."""
    sizes = Sizes(model, resolved["weight_bytes"], torch.device(resolved["device"]).type)
    try:
        return Engine(
            model,
            memory=resolved["memory"],
            micro_batch=config.engine.micro_batch,
            identity_every=config.engine.identity_every,
            seed=config.seed,
            method=resolved["method"],
            sizes=sizes,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


class EngineWorker:
    """Runs tasks of one specification; ``folder`` is the run folder's URL, ``domains`` those of the whole corpus.

    ``weights``: the digest of those that the run was begun with. ``place``: where this process stands among those that
    hold the model together. Raises ModelError where other weights were loaded or the model cannot be divided.
    """

    def __init__(
        self,
        config: AuditConfig,
        resolved: Mapping[str, Any],
        domains: Sequence[str],
        weights: str,
        checkpoint: Checkpoint | None,
        folder: str,
        place: Place = Place(),  # noqa: B008 -- it cannot be changed
    ) -> None:
        self._config, self._domains, self._folder = config, domains, folder
        self._storage = Storage(folder)
        shard = open_shard(
            resolved["backend"],
            resolve_device(resolved["device"]),
            rank=place.rank,
            ranks=place.ranks,
            offload=resolved["offload"],
            folder=config.model.offload_folder,
            seconds=60 * max(config.cluster.hang_minutes, config.cluster.load_minutes),
        )
        # Where ranks share one task, the others have what the first one has.
        self._answers = shard.traits.own_tasks or place.rank == 0
        inspect = partial(require_weights, weights, config.model.source)
        with shard.task():  # it is tried on a probe
            model = load_audited(config, resolved, checkpoint, shard, inspect)
        self._engine = make_engine(config, resolved, model)
        self._calibration: tuple[str, Calibration] | None = None
        draws = any(intervention.kind == "resample" for intervention in config.build_interventions())
        self._stored_outputs = SIZE if draws else None

    def serve(self) -> None:
        with self._engine.model.shard.task():
            pass

    def run(self, task: Task, attempt: int) -> Output:
        start = time.monotonic()
        with self._engine.model.shard.task():
            match task.kind:
                case "measure":
                    output = self._measure(task)
                case "prune":
                    output = self._prune(task)
                case "release":
                    output = self._release(task, attempt)
                case _:
                    output = self._save(task, attempt)
        return Output({**output.receipt, "seconds": round(time.monotonic() - start, 3)}, output.tables)

    def _measure(self, task: Task) -> Output:
        found = self._engine.measure(
            task.sequences,
            task.positions,
            layers=task.layers,
            interventions=task.interventions,
            scope=self._config.scope,
            all_positions=self._config.all_positions,
            calibration=None if task.calibration is None else self._load(task.calibration),
            rankings=None if task.metrics is None else oriented(self._metrics(task.metrics)),
            attribution=task.attribution,
            redistribution=task.redistribution,
        )
        receipt = {
            "method": found.method,
            "micro_batch": found.micro_batch,
            "halvings": found.halvings,
            "skipped": found.skipped,
            "routing_changes": found.routing_changes,
        }
        return Output(receipt, {"effects": found.effects} | ({"tokens": found.tokens} if task.tokens else {}))

    def _prune(self, task: Task) -> Output:
        assert task.metrics is not None
        table = self._metrics(task.metrics)
        overall = table[table["domain"].isna()]
        found = prune_table(self._engine.model, task.sequences, task.prunings, overall, seed=self._config.seed)
        return Output({}, {"pruning": found})

    def _release(self, task: Task, attempt: int) -> Output:
        model = self._engine.model
        texts = [sequence.token_ids.tolist() for sequence in task.sequences]
        table = released_metrics_of_tokens(model, texts, padding_token(model), layers=task.layers)
        name = self._new_folder(task, attempt)
        return Output({"folder": name, "released": self._write(table, f"{name}/released.parquet")})

    def _save(self, task: Task, attempt: int) -> Output:
        """Observe or merge, into a folder of its own: a second attempt does not touch what a first one left."""
        if task.kind == "merge":
            calibration = Calibration.merge([Calibration.load(f"{self._folder}/{part}") for part in task.inputs])
        else:
            calibration = self._engine.observe(
                task.sequences, domains=self._domains, stored_outputs=self._stored_outputs
            )
        name = self._new_folder(task, attempt)
        if self._answers:
            calibration.save(f"{self._folder}/{name}")
        if task.kind != "merge":
            return Output({"folder": name})
        table = metric_table(calibration.observations, weight_metrics(self._engine.model))
        return Output({"folder": name, "metrics": self._write(table, f"{name}/metrics.parquet")})

    @staticmethod
    def _new_folder(task: Task, attempt: int) -> str:
        return f"observations/{task.id}-{attempt}-{uuid.uuid4().hex[:8]}"

    def _write(self, table: pd.DataFrame, name: str) -> str:
        if self._answers:
            sink = io.BytesIO()
            table.to_parquet(sink, index=False)
            self._storage.write(name, sink.getvalue())
        return name

    def _load(self, name: str) -> Calibration:
        if self._calibration is None or self._calibration[0] != name:
            self._calibration = (name, Calibration.load(f"{self._folder}/{name}").to(self._engine.model.device))
        return self._calibration[1]

    def _metrics(self, name: str) -> pd.DataFrame:
        (content,) = self._storage.read_many([f"{name}/metrics.parquet"])
        table: pd.DataFrame = pd.read_parquet(io.BytesIO(content))
        return table
