"""The planner: cuts the work of a specification into tasks.

The cut depends on the specification, the corpus and predicted costs alone, never on the number of groups or on how
fast this machine is today: then any number of groups, and any order of completion, gives the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import pandas as pd

from audit.config import AuditConfig, ConfigError, audited_layers
from audit.config.studies import RedundancyConfig
from audit.corpus import Corpus, TokenSequence, sample_positions
from audit.engine import Cost, Engine
from audit.interventions import NEEDS_CALIBRATION
from audit.packing import packed
from audit.pruning import Pruning, RemovalOrders, model_limits, plan_prunings
from audit.published.released_code import MAX_TOKENS as RELEASED_TOKENS
from audit.published.released_code import padding_token
from cluster.planning.requests import Positions, Request, observed_metrics, requests_of
from cluster.tasks import Task

# Floating-point operations a second that a group is taken to do, per CPU thread or per device. They size tasks and
# guess the time before a run; what is shown while it runs is measured.
NOMINAL_FLOPS = {"cpu": 20e9, "cuda": 20e12}
# A small run is cut into this many tasks at least, so that it can be spread and its progress be seen.
FEWEST_TASKS = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The least that a measuring task can be made of."""

    sequence: TokenSequence
    positions: Positions
    layers: tuple[int, ...]
    cost: Cost


class Planner:
    """Cuts one specification's work into tasks."""

    def __init__(self, config: AuditConfig, engine: Engine, corpus: Corpus) -> None:
        self._config, self._engine, self._studies = config, engine, config.studies
        self._calibration, self._audited = corpus.split(
            config.calibration.share, config.calibration.documents, config.seed
        )
        where = config.positions
        self._positions = sample_positions(
            self._audited, where.sample, config.seed, where.include_first, where.include_special
        )
        self._layers = audited_layers(config, engine.model.description)
        device = engine.sizes.device
        self.flops_per_second = NOMINAL_FLOPS.get(device, NOMINAL_FLOPS["cpu"]) * (
            config.engine.threads if device == "cpu" else 1
        )
        self._target = config.cluster.task_minutes * 60 * self.flops_per_second
        self.bytes = 0

    def seconds(self, stages: Sequence[tuple[str, Sequence[Task]]]) -> float:
        """What one group is predicted to need."""
        return sum(task.flops for _, tasks in stages for task in tasks) / self.flops_per_second

    def stages(self) -> list[tuple[str, list[Task]]]:
        """Observe, merge, effects and what the studies ask for beyond: what a task's id begins with.

        Raises ConfigError where nothing is left to audit.
        """
        if not sum(map(len, self._positions)):
            raise ConfigError("positions: the audited documents have no eligible position; use a larger corpus")
        observe = self._observe("calibration", self._calibration)
        if self._config.calibration.metrics_from == "audited":
            observe += self._observe("audited", self._audited)
        importance = self._studies.importance
        if importance is not None and importance.released_code:
            observe.append(self._release())
        merge = [
            Task(id=f"merge-{part}", kind="merge", inputs=inputs)
            for part in ("calibration", "audited")
            if (inputs := tuple(task.id for task in observe if task.id.startswith(f"observe-{part}-")))
        ]
        stages = [("observe", observe), ("merge", merge)]
        requests = requests_of(self._config, self._engine.model, self._layers, self._positions)
        for request in requests:
            self._require_possible(request)
        stages += [(request.name, self._measure(request)) for request in requests]
        return stages + ([("pruning", self._prune(redundancy))] if (redundancy := self._studies.redundancy) else [])

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

    def _release(self) -> Task:
        texts = self._audited
        try:
            padding_token(self._engine.model)
        except ValueError as error:
            raise ConfigError(f"studies.importance.released_code: {error}") from error
        longest = max(map(len, texts))
        if longest > RELEASED_TOKENS:
            raise ConfigError(
                f"corpus.max_tokens: {longest} tokens, but the released code read {RELEASED_TOKENS} at most; use "
                f"max_tokens: {RELEASED_TOKENS}, or studies.importance.released_code: false"
            )
        padded = [longest] * len(texts)
        return Task(
            id="observe-released-000000",
            kind="release",
            sequences=texts,
            layers=self._layers,
            rows=sum(padded),
            flops=self._engine.cost(padded, [0] * len(texts), (), ()).flops,
        )

    def _measure(self, request: Request) -> list[Task]:
        audited = zip(self._audited, request.positions, strict=True)
        pieces = [
            piece
            for sequence, positions in audited
            if len(positions)
            for piece in self._pieces(request, sequence, positions)
        ]
        self.bytes += sum(piece.cost.bytes for piece in pieces)
        draws = any(intervention.kind in NEEDS_CALIBRATION for intervention in request.interventions)
        ranks = any(intervention.target.metric is not None for intervention in request.interventions)
        groups = [
            group
            for _, same_layers in groupby(pieces, key=lambda piece: piece.layers)
            for group in _pack(list(same_layers), lambda piece: piece.cost.flops, self._target)
        ]
        return [
            Task(
                id=f"{request.name}-{number:06d}",
                kind="measure",
                sequences=[piece.sequence for piece in group],
                positions=[piece.positions for piece in group],
                layers=group[0].layers,
                interventions=request.interventions,
                tokens=request.tokens and group[0].layers[0] == request.layers[0],
                attribution=request.attribution,
                redistribution=request.redistribution,
                calibration="merge-calibration" if draws else None,
                metrics=f"merge-{self._config.calibration.metrics_from}" if ranks else None,
                rows=sum(piece.cost.rows for piece in group),
                flops=sum(piece.cost.flops for piece in group),
            )
            for number, group in enumerate(groups)
        ]

    def _prune(self, study: RedundancyConfig) -> list[Task]:
        metrics = observed_metrics("redundancy", study.metrics, self._engine.model)
        prunings = plan_prunings(self._layers, metrics, shares=study.shares, draws=study.draws)
        self._require_prunable(prunings)
        documents = sorted({sequence.document for sequence in self._audited})
        if study.documents is not None and study.documents < len(documents):
            documents = (
                np.random.default_rng(self._config.seed).choice(documents, study.documents, replace=False).tolist()
            )
        sequences = [sequence for sequence in self._audited if sequence.document in set(documents)]
        whole = sum(self._engine.cost([len(sequence)], [0], (), ()).flops for sequence in sequences)
        depth = len(self._engine.model.layers)

        def cost(pruning: Pruning) -> float:  # it begins at the first layer that is pruned
            return whole * (depth - min(pruning.layers)) / depth

        return [
            Task(
                id=f"pruning-{number:06d}",
                kind="prune",
                sequences=sequences,
                prunings=tuple(group),
                metrics=f"merge-{self._config.calibration.metrics_from}",
                rows=len(group) * len(documents),
                flops=whole + sum(map(cost, group)),
            )
            for number, group in enumerate(_pack(prunings, cost, self._target))
        ]

    def _pieces(self, request: Request, sequence: TokenSequence, positions: Positions) -> list[_Piece]:
        """A sequence whole, or cut where it costs more than a task may: by positions, or by layers in sequence scope.

        In sequence scope one forward gives every position, and cutting by positions would run it again for each.
        """
        whole = self._piece(request, sequence, positions, request.layers)
        parts = math.ceil(whole.cost.flops / self._target)
        if parts == 1:
            return [whole]
        if self._config.scope == "sequence":
            layers = np.array_split(request.layers, min(parts, len(request.layers)))
            return [self._piece(request, sequence, positions, tuple(part.tolist())) for part in layers]
        cut = np.array_split(positions, min(parts, len(positions)))
        return [self._piece(request, sequence, at, request.layers) for at in cut]

    def _piece(
        self, request: Request, sequence: TokenSequence, positions: Positions, layers: tuple[int, ...]
    ) -> _Piece:
        scope = self._config.scope
        cost = self._engine.cost(
            [len(sequence)],
            [len(positions)],
            layers,
            request.interventions,
            scope,
            request.attribution,
            request.redistribution,
        )
        return _Piece(sequence, positions, layers, cost)

    def _require_prunable(self, prunings: Sequence[Pruning]) -> None:
        """Raise ConfigError where a share removes nobody, or more experts than a router can do without."""
        if self._engine.model.reroute_refused:
            raise ConfigError(f"studies.redundancy: this model cannot be pruned, {self._engine.model.reroute_refused}")
        no_metrics = pd.DataFrame(columns=["layer", "metric"])  # how many are removed does not depend on them
        orders = RemovalOrders(no_metrics, model_limits(self._engine.model), self._config.seed)
        for pruning in prunings:
            if pruning.draw == 0:
                try:
                    orders.removed(pruning)
                except ValueError as error:
                    raise ConfigError(f"studies.redundancy.shares{str(error).removeprefix('share')}") from error

    def _require_possible(self, request: Request) -> None:
        longest = max((len(sequence) for sequence in self._audited), default=1)
        layers, interventions, scope = request.layers, request.interventions, self._config.scope
        try:
            self._engine.require_possible(layers, interventions, scope, self._config.all_positions)
            self._engine.require_room(longest, layers, interventions, scope, request.attribution)
        except ValueError as error:
            raise ConfigError(str(error)) from error


T = TypeVar("T")


def _pack(items: Sequence[T], cost: Callable[[T], float], most: float) -> Iterator[list[T]]:
    """Neighbours together up to a cost of ``most``, less where that leaves few groups."""
    return packed(items, cost, min(most, sum(map(cost, items)) / FEWEST_TASKS))
