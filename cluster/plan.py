"""The plan: from a specification to a job, with every choice that decides bits made once, and the work cut into tasks.

The cut depends on the specification, the corpus and predicted costs alone, never on the number of replicas or on how
fast this machine is today: then any number of replicas, and any order of completion, gives the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from audit.config import AuditConfig, ConfigError, audited_layers, check_against
from audit.corpus import Corpus, TokenSequence, build_corpus, sample_positions
from audit.engine import Cost, Engine
from audit.interventions import NEEDS_CALIBRATION, Intervention
from cluster.driver import Policy
from cluster.engine_worker import EngineWorker, load_engine
from cluster.identity import BINDING, environment, versions, weights_digest
from cluster.run import Job, identity_of
from cluster.session import cores
from cluster.tasks import Task, digest

# Floating-point operations a second that a replica is taken to do, per CPU thread or per device. They size tasks and
# guess the time before a run; what is shown while it runs is measured.
NOMINAL_FLOPS = {"cpu": 20e9, "cuda": 20e12}
# A small run is cut into this many tasks at least, so that it can be spread and its progress be seen.
FEWEST_TASKS = 32

Positions = NDArray[np.int64]


def prepare(config: AuditConfig, resolved: Mapping[str, Any] | None = None) -> Job:
    """Think a run through; nothing is written. ``resolved``: the choices of the run that is to be resumed.

    Raises ConfigError or ModelError, one sentence, for what cannot be done.
    """
    transformers.utils.logging.disable_progress_bar()
    model, engine = load_engine(config, resolved)
    resolved = {
        "method": engine.method,
        "experts": model.experts_path,
        "linear": model.linear_path,
        "device": str(model.device),
        "micro_batch": engine.micro_batch(config.corpus.max_tokens),
    }
    check_against(config, model.description)
    if model.reroute_refused and (number := _first_of_kind(config, "reroute")) is not None:
        raise ConfigError(f"interventions.{number}: reroute is refused for this model, {model.reroute_refused}")
    corpus = build_corpus(config.corpus, model.tokenizer, model.description.context_limit, config.folder)
    planner = Planner(config, engine, corpus)
    stages = planner.stages()
    information = {
        "specification": config.resolved(),
        "environment": environment(),
        "model": asdict(model.description),
        "corpus": {"counts": corpus.counts, "summary": corpus.summary(), "domains": corpus.domains},
        "seeds": {"split": config.seed, "positions": config.seed, "engine": config.seed},
        "plan": [
            {"stage": s, "tasks": len(t), "rows": sum(x.rows for x in t), "flops": sum(x.flops for x in t)}
            for s, t in stages
        ],
        "predicted": {"bytes": planner.bytes, "replica_seconds": planner.seconds(stages)},
    }
    identity = {
        "specification": identity_of(config.resolved()),
        "model": {"weights": weights_digest(model.module)},
        "corpus": {"digest": corpus.digest},
        "versions": versions(BINDING),
        "resolved": resolved,
        "plan": {stage: digest(tasks) for stage, tasks in stages},
    }
    on_gpu = model.device.type == "cuda"
    return Job(
        stages=stages,
        identity=identity,
        information=information,
        make_worker=partial(EngineWorker, config, resolved, tuple(corpus.domains)),
        replicas=_replicas(config, on_gpu),
        cpus_per_replica=config.engine.threads,
        gpus_per_replica=1 if on_gpu else 0,
        policy=Policy(max_attempts=config.cluster.max_attempts, hang_seconds=config.cluster.hang_minutes * 60),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The least that a measuring task can be made of."""

    sequence: TokenSequence
    positions: Positions
    layers: tuple[int, ...]
    cost: Cost


def _first_of_kind(config: AuditConfig, kind: str) -> int | None:
    return next((number for number, entry in enumerate(config.interventions) if entry.kind == kind), None)


def require_distinct(interventions: Sequence[Intervention]) -> None:
    """Raise ConfigError where the effect table could not tell two interventions' effects apart, and would pool them."""
    seen: dict[tuple[object, ...], int] = {}
    for number, intervention in enumerate(interventions):
        target = intervention.target
        parameter = intervention.factor if intervention.kind == "scale" else target.count
        first = seen.setdefault((target.selection, intervention.kind, parameter), number)
        if first != number:
            same = f"target {target.selection}, {intervention.kind}" + (
                "" if parameter is None else f", parameter {parameter:g}"
            )
            raise ConfigError(
                f"interventions.{number}: its effects would not be told from those of interventions.{first} ({same}); "
                "give each an audit of its own"
            )


class Planner:
    """Cuts one specification's work into tasks."""

    def __init__(self, config: AuditConfig, engine: Engine, corpus: Corpus) -> None:
        self._config, self._engine = config, engine
        self._calibration, self._audited = corpus.split(
            config.calibration.share, config.calibration.documents, config.seed
        )
        where = config.positions
        self._positions = sample_positions(
            self._audited, where.sample, config.seed, where.include_first, where.include_special
        )
        self._layers = audited_layers(config, engine.model.description)
        self._interventions = config.build_interventions()
        require_distinct(self._interventions)
        longest = max((len(sequence) for sequence in self._audited), default=1)
        try:
            engine.require_possible(self._layers, self._interventions, config.scope, config.all_positions)
            engine.require_room(longest, self._layers, self._interventions, config.scope)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        device = engine.model.device.type
        self._flops_per_second = NOMINAL_FLOPS.get(device, NOMINAL_FLOPS["cpu"]) * (
            config.engine.threads if device == "cpu" else 1
        )
        self._target = config.cluster.task_minutes * 60 * self._flops_per_second
        self.bytes = 0

    def seconds(self, stages: Sequence[tuple[str, Sequence[Task]]]) -> float:
        """What one replica is predicted to need."""
        return sum(task.flops for _, tasks in stages for task in tasks) / self._flops_per_second

    def stages(self) -> list[tuple[str, list[Task]]]:
        """Observe, merge, effects: what a task's id begins with. Raises ConfigError where nothing is left to audit."""
        if not sum(map(len, self._positions)):
            raise ConfigError("positions: the audited documents have no eligible position; use a larger corpus")
        observe = self._observe("calibration", self._calibration)
        if self._config.calibration.metrics_from == "audited":
            observe += self._observe("audited", self._audited)
        merge = [
            Task(id=f"merge-{part}", kind="merge", inputs=inputs)
            for part in ("calibration", "audited")
            if (inputs := tuple(task.id for task in observe if task.id.startswith(f"observe-{part}-")))
        ]
        return [("observe", observe), ("merge", merge), ("effects", self._measure())]

    def _observe(self, part: str, sequences: Sequence[TokenSequence]) -> list[Task]:
        def cost(sequence: TokenSequence) -> float:  # every layer runs twice: with its experts and without
            return 2 * self._engine.cost([len(sequence)], [0], (), ()).flops

        groups = _pack(sequences, cost, self._target)
        return [
            Task(
                id=f"observe-{part}-{number:06d}",
                kind="observe",
                sequences=group,
                rows=sum(map(len, group)),
                flops=sum(map(cost, group)),
            )
            for number, group in enumerate(groups)
        ]

    def _measure(self) -> list[Task]:
        audited = zip(self._audited, self._positions, strict=True)
        pieces = [
            piece for sequence, positions in audited if len(positions) for piece in self._pieces(sequence, positions)
        ]
        self.bytes = sum(piece.cost.bytes for piece in pieces)
        needs = any(intervention.kind in NEEDS_CALIBRATION for intervention in self._interventions)
        groups = [
            group
            for _, same_layers in groupby(pieces, key=lambda piece: piece.layers)
            for group in _pack(list(same_layers), lambda piece: piece.cost.flops, self._target)
        ]
        return [
            Task(
                id=f"effects-{number:06d}",
                kind="measure",
                sequences=[piece.sequence for piece in group],
                positions=[piece.positions for piece in group],
                layers=group[0].layers,
                interventions=self._interventions,
                tokens=group[0].layers[0] == self._layers[0],
                inputs=("merge-calibration",) if needs else (),
                rows=sum(piece.cost.rows for piece in group),
                flops=sum(piece.cost.flops for piece in group),
            )
            for number, group in enumerate(groups)
        ]

    def _pieces(self, sequence: TokenSequence, positions: Positions) -> list[_Piece]:
        """A sequence whole, or cut where it costs more than a task may: by positions, or by layers in sequence scope.

        In sequence scope one forward gives every position, and cutting by positions would run it again for each.
        """
        whole = self._piece(sequence, positions, self._layers)
        parts = math.ceil(whole.cost.flops / self._target)
        if parts == 1:
            return [whole]
        if self._config.scope == "sequence":
            layers = np.array_split(self._layers, min(parts, len(self._layers)))
            return [self._piece(sequence, positions, tuple(part.tolist())) for part in layers]
        return [self._piece(sequence, at, self._layers) for at in np.array_split(positions, min(parts, len(positions)))]

    def _piece(self, sequence: TokenSequence, positions: Positions, layers: tuple[int, ...]) -> _Piece:
        cost = self._engine.cost([len(sequence)], [len(positions)], layers, self._interventions, self._config.scope)
        return _Piece(sequence, positions, layers, cost)


T = TypeVar("T")


def _pack(items: Sequence[T], cost: Callable[[T], float], most: float) -> Iterator[list[T]]:
    """Neighbours together up to a cost of ``most``, less where that leaves few groups; what costs more is alone."""
    most = min(most, sum(map(cost, items)) / FEWEST_TASKS)
    group: list[T] = []
    held = 0.0
    for item in items:
        if group and held + cost(item) > most:
            yield group
            group, held = [], 0.0
        group.append(item)
        held += cost(item)
    if group:
        yield group


def _replicas(config: AuditConfig, on_gpu: bool) -> int:
    """How many replicas are wanted: as many as there are devices, or as many as the cores hold."""
    if config.cluster.replicas != "auto":
        return config.cluster.replicas
    return torch.cuda.device_count() if on_gpu else max(1, cores() // config.engine.threads)
