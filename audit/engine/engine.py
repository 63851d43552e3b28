"""The engine as its users see it: effects of interventions on token sequences as Arrow tables, within a memory
budget.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.calibration import Calibration
from audit.corpus import TokenSequence
from audit.engine.allocator import keep_freed_memory
from audit.engine.attribution import LossGradients, loss_gradients, own_loss_gradients
from audit.engine.cost import (
    MOST_CLEAN_ROWS,
    SMALLEST_MICRO_BATCH,
    Cost,
    Sizes,
    cost_of,
    default_memory,
    gradient_rows_for,
    micro_batch_for,
    shares,
    working_bytes,
)
from audit.engine.observe import observe
from audit.engine.oracle import oracle
from audit.engine.repeats import choose, paired, request_again
from audit.engine.result import Request, Result, plan_bytes, ranking_values
from audit.engine.rounding import other_rounding
from audit.engine.suffix import suffix
from audit.engine.sweep import sweep, worlds_per_row
from audit.engine.tables import effect_table, token_table
from audit.interventions import NEEDS_CALIBRATION, Intervention, Scope
from audit.models.moe_model import MoEModel
from audit.models.shards.errors import out_of_memory
from audit.models.shards.machine import machine_of

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Measurement:
    """What :meth:`Engine.measure` found, and how it was found."""

    tokens: pa.Table
    effects: pa.Table
    method: str  # sweep, suffix or oracle
    micro_batch: int  # rows that went through a layer at once, after halvings
    halvings: int = 0  # how often memory ran out
    skipped: int = 0  # targets with nothing to act upon or without calibration
    routing_changes: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # layer: identity rows, those routed otherwise above


class Engine:
    """Measures effects with one loaded model.

    ``memory`` (bytes) bounds weights, program and working memory together; None: what
    :func:`audit.engine.cost.default_memory` says. ``micro_batch`` is derived from it unless given. ``method``: ``auto``
    takes the sweep where the model allows it, ``oracle`` one whole forward per effect. ``seed`` decides the draws of
    ``resample`` and of ``random`` targets. ``sizes``: where another process will compute, with other weights on another
    device. Raises ValueError where the budget is too small.
    """

    def __init__(
        self,
        model: MoEModel,
        *,
        memory: int | None = None,
        micro_batch: int | None = None,
        identity_every: int = 8,
        seed: int = 0,
        method: str = "auto",
        sizes: Sizes | None = None,
    ) -> None:
        if method not in ("auto", "sweep", "oracle"):
            raise ValueError(f"engine.method: {method!r} is unknown; known are auto, sweep, oracle")
        for name, value in (("identity_every", identity_every), ("micro_batch", micro_batch)):
            if value is not None and value < 1:
                raise ValueError(f"engine.{name}: {value} is not possible; it must be at least 1")
        if method == "sweep" and model.description.engine != "sweep":
            raise ValueError(
                f"engine.method: 'sweep' is not possible, {model.description.engine_reason}; use auto or oracle"
            )
        self.model, self.identity_every, self.seed = model, identity_every, seed
        self.method = model.description.engine if method == "auto" else method
        self.sizes = sizes or Sizes(model, model.shard.weight_bytes(model.layers, model.module))
        self.memory = default_memory(self.sizes, machine_of(model.device).memory) if memory is None else memory
        keep_freed_memory()
        self._working = working_bytes(self.sizes, self.memory)
        self._micro_batch = micro_batch

    def micro_batch(self, length: int) -> int:
        """Rows that go through a layer at once for sequences of up to ``length`` tokens."""
        return self._micro_batch or micro_batch_for(self.sizes, self.memory, length)

    def measure(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[NDArray[np.int64]],
        *,
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        scope: Scope = "token",
        all_positions: bool = False,
        calibration: Calibration | None = None,
        rankings: Mapping[str, Mapping[int, NDArray[np.float64]]] | None = None,
        attribution: bool = False,
        redistribution: bool = False,
    ) -> Measurement:
        """Effects of every intervention at every layer on the given positions of each sequence.

        ``attribution`` adds each expert's first-order estimate of its effect, ``redistribution`` what remains of the
        layer's output under ``zero``; columns of these names are null otherwise.
        ``rankings``, metric: layer: a value per expert [E], high meaning important, are what ``ranked`` targets order
        by. A token with an active expert whose value is NaN is skipped by that target and counted.
        The tables' schemas are ``audit.effects.EFFECTS`` and ``TOKENS``. Raises ValueError for what cannot be measured.
        """
        self.require_possible(layers, interventions, scope, all_positions)
        _check_additions(interventions, scope, attribution, redistribution)
        if attribution and self.method == "oracle" and not self.model.shard.traits.resident:
            raise ValueError(
                "attribution: true needs all layers' weights at one time with the oracle, which this model takes "
                f"({self.model.description.engine_reason}); back end {self.model.shard.backend} has one layer's"
            )
        self._check_tokens(sequences, positions)
        _check_calibration(interventions, calibration)
        ranked = ranking_values(self.model.sites, layers, interventions, rankings, self.model.device)
        longest = max(len(s.token_ids) for s in sequences)
        self.require_room(longest, layers, interventions, scope, attribution)
        micro_batch, halvings, skipped = self.micro_batch(longest), 0, 0
        tokens: list[pa.Table] = []
        effects: list[pa.Table] = []
        changes: dict[int, tuple[int, int]] = {}
        placed = calibration.to(self.model.device) if calibration is not None else None
        for batch, at in self._sweeps(sequences, positions, layers, interventions, micro_batch, scope, attribution):
            request = self._request(
                batch, at, layers, interventions, scope, all_positions, placed, ranked, attribution, redistribution
            )
            while True:
                try:
                    with self.model.shard.sweep(partial(plan_bytes, request, micro_batch)):
                        result = self._run(request, micro_batch)
                    break
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not out_of_memory(error) or micro_batch <= SMALLEST_MICRO_BATCH:
                        raise
                micro_batch, halvings = micro_batch // 2, halvings + 1
                log.warning("out of memory: going on with micro-batches of %d rows", micro_batch)
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()
            effects.append(effect_table(result, request, batch))
            tokens.append(token_table(result, request, batch))
            skipped += result.skipped
            _count_changes(result, changes)
        method = self.method if self.method == "oracle" or scope == "token" else "suffix"
        return Measurement(
            pa.concat_tables(tokens), pa.concat_tables(effects), method, micro_batch, halvings, skipped, changes
        )

    def observe(
        self,
        sequences: Sequence[TokenSequence],
        *,
        domains: Sequence[str] | None = None,
        stored_outputs: int | None = None,
    ) -> Calibration:
        """Observations of the experts on clean tokens; with ``stored_outputs`` also that many outputs per
        expert for ``resample``.
        """
        names = sorted({s.domain for s in sequences}) if domains is None else domains
        return observe(self.model, sequences, names, stored_outputs=stored_outputs, seed=self.seed)

    def cost(
        self,
        lengths: Sequence[int],
        positions: Sequence[int],
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        scope: Scope = "token",
        attribution: bool = False,
        redistribution: bool = False,
    ) -> Cost:
        """What measuring ``positions[i]`` tokens of sequences of ``lengths[i]`` tokens will take, before it runs."""
        worlds = float(sum(worlds_per_row(i, self.sizes.top_k) for i in interventions))
        return cost_of(
            self.sizes,
            lengths,
            positions,
            layers,
            worlds,
            interventions,
            scope,
            self.identity_every,
            attribution,
            redistribution,
        )

    def require_possible(
        self,
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        scope: Scope = "token",
        all_positions: bool = False,
    ) -> None:
        """Raise ValueError, one sentence, where this model cannot take these interventions at these layers."""
        if scope not in get_args(Scope):
            raise ValueError(f"scope: {scope!r} is unknown; known are {', '.join(get_args(Scope))}")
        if all_positions and scope == "token":
            raise ValueError("all_positions: true goes with scope sequence; at one token there are no other positions")
        if not layers:
            raise ValueError("layers: the list is empty; name at least one MoE layer")
        for number, intervention in enumerate(interventions):
            if intervention in interventions[:number]:
                raise ValueError(
                    f"interventions.{number}: it repeats interventions.{interventions.index(intervention)}"
                )
        for layer in layers:
            if layer not in self.model.sites:
                known = ", ".join(map(str, self.model.description.moe_layers))
                raise ValueError(f"layers: {layer} is not an MoE layer; those are {known}")
            site = self.model.sites[layer]
            for intervention in interventions:
                intervention.check(site.top_k, site.num_experts, site.shared is not None)
        if any(i.kind == "reroute" for i in interventions) and self.model.reroute_refused:
            raise ValueError(f"intervention.kind: reroute is refused for this model, {self.model.reroute_refused}")

    def require_room(
        self,
        length: int,
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        scope: Scope,
        attribution: bool = False,
    ) -> None:
        """Raise ValueError where the memory does not hold one audited token of a sequence of ``length``."""
        micro_batch = self.micro_batch(length)
        left, clean, per_position = self._shares(length, layers, interventions, micro_batch, scope, attribution)
        if left < length * clean + per_position:
            needed = self.memory - left + length * clean + per_position
            raise ValueError(
                f"engine.memory: {self.memory / 2**20:,.0f} MiB do not hold one token of a sequence of "
                f"{length}; give at least {needed / 2**20:,.0f} MiB or shorter sequences"
            )

    def _shares(
        self,
        length: int,
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        micro_batch: int,
        scope: Scope,
        attribution: bool,
    ) -> tuple[float, float, float]:
        """Bytes left beside a micro-batch, bytes per clean token, bytes per audited position."""
        worlds = sum(worlds_per_row(i, self.sizes.top_k) for i in interventions) + 1.0 / self.identity_every
        left = self._working - micro_batch * self.sizes.row_bytes(length)
        return shares(self.sizes, left, length, layers, worlds, scope, attribution)

    # ---- one sweep --------------------------------------------------------------------------------------------------

    def _run(self, request: Request, micro_batch: int) -> Result:
        """The effects asked for, then some of them again under another rounding."""
        result = self._compute(request, micro_batch)
        chosen = choose(result, request)
        if chosen:
            again, chosen = request_again(request, chosen)
            with other_rounding(self.model, request.seed):
                result.repeats = paired(chosen, self._compute(again, micro_batch))
        return result

    def _compute(self, request: Request, micro_batch: int) -> Result:
        gradients = self._gradients(request, micro_batch) if request.attribution else None
        with self.model.kernels():
            if self.method == "oracle":
                return oracle(self.model, request, gradients)
            return (
                sweep(self.model, request, micro_batch, gradients)
                if request.scope == "token"
                else suffix(self.model, request, micro_batch)
            )

    def _gradients(self, request: Request, micro_batch: int) -> LossGradients:
        if self.method == "oracle":
            return own_loss_gradients(self.model, request)
        lengths = [len(ids) for ids in request.sequences]
        first = min(request.layers)
        rows = gradient_rows_for(self.sizes, self._working, sum(lengths), len(request.rows_M), max(lengths), first)
        return loss_gradients(self.model, request, min(rows, micro_batch))

    def _request(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[NDArray[np.int64]],
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        scope: Scope,
        all_positions: bool,
        calibration: Calibration | None,
        rankings: Mapping[str, Mapping[int, Tensor]],
        attribution: bool,
        redistribution: bool,
    ) -> Request:
        device = self.model.device
        lengths = [len(s.token_ids) for s in sequences]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        rows = np.concatenate([start + at for start, at in zip(starts, positions, strict=True)])
        sequence_T = np.concatenate(
            [np.full(n, s.index, dtype=np.int64) for n, s in zip(lengths, sequences, strict=True)]
        )
        position_T = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
        return Request(
            [torch.from_numpy(s.token_ids).to(device) for s in sequences],
            torch.from_numpy(rows).to(device),
            (torch.from_numpy(sequence_T).to(device), torch.from_numpy(position_T).to(device)),
            frozenset(layers),
            interventions,
            scope,
            all_positions,
            self.identity_every,
            calibration,
            self.seed,
            rankings,
            attribution,
            redistribution,
        )

    def _sweeps(
        self,
        sequences: Sequence[TokenSequence],
        positions: Sequence[NDArray[np.int64]],
        layers: Sequence[int],
        interventions: Sequence[Intervention],
        micro_batch: int,
        scope: Scope,
        attribution: bool,
    ) -> Iterator[tuple[list[TokenSequence], list[NDArray[np.int64]]]]:
        """Several short sequences in one sweep, the positions of a long one in several, as the working
        memory allows.
        """
        batch: list[TokenSequence] = []
        at: list[NDArray[np.int64]] = []
        clean_rows = audited = 0
        for sequence, rows in zip(sequences, positions, strict=True):
            T = len(sequence.token_ids)
            left, clean, per_position = self._shares(T, layers, interventions, micro_batch, scope, attribution)
            most = int((left - T * clean) // per_position)
            for part in np.array_split(rows, -(-len(rows) // most)) if len(rows) else []:
                fits = (clean_rows + T) * clean + (
                    audited + len(part)
                ) * per_position <= left and clean_rows + T <= MOST_CLEAN_ROWS
                if batch and (not fits or batch[-1] is sequence):
                    yield batch, at
                    batch, at, clean_rows, audited = [], [], 0, 0
                batch.append(sequence)
                at.append(part)
                clean_rows, audited = clean_rows + T, audited + len(part)
        if batch:
            yield batch, at

    def _check_tokens(self, sequences: Sequence[TokenSequence], positions: Sequence[NDArray[np.int64]]) -> None:
        limit = self.model.description.context_limit
        if len(positions) != len(sequences) or not sum(len(at) for at in positions):
            raise ValueError(
                f"positions: {sum(len(at) for at in positions)} positions for {len(sequences)} sequences; "
                "every sequence needs its list, and one must not be empty"
            )
        for sequence, at in zip(sequences, positions, strict=True):
            T = len(sequence.token_ids)
            if limit is not None and limit < T:
                raise ValueError(
                    f"sequences: sequence {sequence.index} has {T} tokens, the model reads at most {limit}; split it"
                )
            if len(at) and (at[0] < 0 or at[-1] >= T or (np.diff(at) <= 0).any()):
                raise ValueError(
                    f"positions: those of sequence {sequence.index} must be ascending and lie in 0 to {T - 1}"
                )


def _check_calibration(interventions: Sequence[Intervention], calibration: Calibration | None) -> None:
    for intervention in interventions:
        if intervention.kind in NEEDS_CALIBRATION and calibration is None:
            raise ValueError(
                f"intervention.kind: {intervention.kind} needs a calibration; pass what Engine.observe returned"
            )
        if intervention.kind == "resample" and calibration is not None and calibration.stored is None:
            raise ValueError("intervention.kind: resample needs stored outputs; observe with stored_outputs=256")


def _check_additions(
    interventions: Sequence[Intervention], scope: Scope, attribution: bool, redistribution: bool
) -> None:
    if attribution and scope != "token":
        raise ValueError(
            f"attribution: true does not go with scope {scope}; it estimates what happens at one token, use scope token"
        )
    if attribution and not any(i.target.selection == "each" for i in interventions):
        raise ValueError("attribution: true needs an intervention on single experts; add one with target each")
    if redistribution and not any(i.kind == "zero" and i.target.selection != "shared" for i in interventions):
        raise ValueError("redistribution: true needs zero on routed experts; add the intervention zero")


def _count_changes(result: Result, changes: dict[int, tuple[int, int]]) -> None:
    first = 0
    for effect in result.effects:
        end = first + len(effect.worlds)
        if effect.worlds.identity:
            rows, otherwise = changes.get(effect.layer, (0, 0))
            changes[effect.layer] = (rows + end - first, otherwise + int(result.changed_P[first:end].sum()))
        first = end
