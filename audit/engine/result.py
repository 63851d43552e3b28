"""What is asked of an engine, and what it answers: one form for the sweep, the suffix engine and the oracle.

Shapes: T clean rows of all sequences, M audited rows, P effects, K slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.calibration import Calibration
from audit.engine.worlds import IDENTITY, Criteria, Routed, Worlds
from audit.interventions import NEEDS_CALIBRATION, Intervention, Scope
from audit.models.discovery import Site
from audit.outcomes import BaselineScores, Outcomes


class Key(NamedTuple):
    """What tells the effects of one intervention at one layer apart."""

    row: int  # clean row
    expert: int  # -1 where the target is not one expert
    draw: int
    experts: tuple[int, ...]  # acted upon here: [K] ids ascending, after -1 for every slot that is not


def keys_of(worlds: Worlds, experts_PK: Tensor, start: int = 0) -> list[Key]:
    """The keys of worlds whose active experts are ``experts_PK``; clean rows are counted from ``start``."""
    acted_PK = torch.where(worlds.members_PK, experts_PK, -1).sort(1).values
    columns = ((worlds.parent_P + start).tolist(), worlds.expert_P.tolist(), worlds.draw_P.tolist())
    return [
        Key(row, expert, draw, tuple(acted))
        for row, expert, draw, acted in zip(*columns, acted_PK.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Effects of every intervention at every layer on the audited rows of a few sequences."""

    sequences: Sequence[Tensor]  # token ids, each [its length]
    rows_M: Tensor  # audited clean rows over all sequences, ascending
    token_T: tuple[Tensor, Tensor]  # sequence number and position of each clean row; all that seeded draws depend on
    layers: frozenset[int]
    interventions: Sequence[Intervention]
    scope: Scope
    all_positions: bool
    identity_every: int
    calibration: Calibration | None
    seed: int
    rankings: Mapping[str, Mapping[int, Tensor]]  # metric: layer: oriented values [E] for ranked targets
    attribution: bool  # whether single experts get a first-order estimate
    redistribution: bool  # whether zero is to say what remains beside what went
    only: Mapping[int, frozenset[Key]] | None = None  # the effects wanted at each layer; None: all, and controls

    @property
    def asked(self) -> list[tuple[Intervention, bool]]:
        """What is done, in this order, and whether it is the identity control."""
        controls = [] if self.only is not None else [(IDENTITY, True)]
        return [*((i, False) for i in self.interventions), *controls]

    def wanted(self, layer: int, worlds: Worlds, experts_PK: Tensor, start: int = 0) -> Tensor:
        """Which [P] of ``worlds`` are among those wanted; arguments as of :func:`keys_of`."""
        if self.only is None:
            return torch.ones_like(worlds.parent_P, dtype=torch.bool)
        found = [key in self.only[layer] for key in keys_of(worlds, experts_PK, start)]
        return torch.tensor(found, dtype=torch.bool, device=worlds.parent_P.device)

    def criteria(self, layer: int, token_T: tuple[Tensor, Tensor]) -> Criteria:
        """What sets of experts are chosen by at the layer, for the clean rows that ``token_T`` identifies."""
        values = {metric: by_layer[layer] for metric, by_layer in self.rankings.items() if layer in by_layer}
        return Criteria(layer, token_T, self.seed, values)

    def missing(self, intervention: Intervention, layer: int) -> list[int]:
        """Experts of the layer that ``intervention`` cannot act upon because no calibration token was
        routed to them.
        """
        if intervention.kind not in NEEDS_CALIBRATION:
            return []
        assert self.calibration is not None
        return self.calibration.missing(layer)


def plan_bytes(request: Request, micro_batch: int) -> bytes:
    """What a request says to compute, as bytes that are equal where two requests are."""
    ranked = [
        request.rankings[metric][layer] for metric in sorted(request.rankings) for layer in sorted(request.layers)
    ]
    tensors = [*request.sequences, request.rows_M, *request.token_T, *ranked]
    calibrated = request.calibration if any(i.kind in NEEDS_CALIBRATION for i in request.interventions) else None
    said = (
        micro_batch,
        sorted(request.layers),
        list(request.interventions),
        request.scope,
        request.all_positions,
        request.identity_every,
        request.seed,
        request.attribution,
        request.redistribution,
        [] if calibrated is None else [calibrated.checksum(layer) for layer in sorted(request.layers)],
    )
    return repr(said).encode() + b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)


def ranking_values(
    sites: Mapping[int, Site],
    layers: Sequence[int],
    interventions: Sequence[Intervention],
    rankings: Mapping[str, Mapping[int, NDArray[np.float64]]] | None,
    device: torch.device,
) -> dict[str, dict[int, Tensor]]:
    """The values that ``ranked`` targets order by, metric: layer: [E]. Raises ValueError where some are missing."""
    given, found = rankings or {}, dict[str, dict[int, Tensor]]()
    for metric in (i.target.metric for i in interventions if i.target.metric is not None):
        if metric not in given:
            raise ValueError(
                f"rankings: {metric!r} is missing, but an intervention ranks by it; give its values per layer"
            )
        for layer in layers:
            shape = np.shape(given[metric][layer]) if layer in given[metric] else "no values"
            experts = sites[layer].num_experts
            if shape != (experts,):
                raise ValueError(f"rankings.{metric}.{layer}: {shape}; one value per expert ({experts}) is needed")
            values = torch.tensor(given[metric][layer], dtype=torch.float64)
            found.setdefault(metric, {})[layer] = values.to(device)
    return found


@dataclass(frozen=True, slots=True)
class Redistribution:
    """What remains of a layer's output under ``zero`` beside what went: remainder y', gap y - y' (arXiv 2606.10703).

    ``shared``: y with the shared experts' output. NaN: the cosine where either vector is zero, and the shared variants
    where a layer has no shared experts. Each [P].
    """

    remainder_norm: Tensor
    gap_cosine: Tensor
    remainder_norm_shared: Tensor
    gap_cosine_shared: Tensor

    @staticmethod
    def of(gap_PD: Tensor, remainder_PD: Tensor, shared_PD: Tensor | None) -> Redistribution:
        """From y - y' and y', both of the routed experts alone, and what shared experts add to either."""
        wide = torch.promote_types(gap_PD.dtype, torch.float32)
        gap_PD, remainder_PD = gap_PD.to(wide), remainder_PD.to(wide)
        routed = _norm_and_cosine(gap_PD, remainder_PD)
        if shared_PD is None:
            nothing = torch.full_like(routed[0], torch.nan)
            return Redistribution(*routed, nothing, nothing)
        return Redistribution(*routed, *_norm_and_cosine(gap_PD, remainder_PD + shared_PD.to(wide)))

    @staticmethod
    def joined(parts: Sequence[Redistribution]) -> Redistribution:
        """Those of several groups of worlds, one after another."""
        return Redistribution(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Redistribution)))

    def __getitem__(self, part: Tensor) -> Redistribution:
        return Redistribution(*(getattr(self, f.name)[part] for f in fields(self)))


def _norm_and_cosine(gap_PD: Tensor, remainder_PD: Tensor) -> tuple[Tensor, Tensor]:
    norm, gap_norm = (torch.linalg.vector_norm(v, dim=-1) for v in (remainder_PD, gap_PD))
    # 0 / 0 is NaN as it should be. Divided one by one: the product of two small norms may vanish.
    cosine = ((gap_PD / gap_norm[:, None]) * (remainder_PD / norm[:, None])).sum(-1)
    return norm, cosine.clamp(-1.0, 1.0)


@dataclass(slots=True)
class Effects:
    """The effects of one intervention at one layer, without their outcomes."""

    layer: int
    worlds: Worlds
    experts_PK: Tensor  # ids of the parent's active experts
    routing_weight_P: Tensor  # summed over the experts acted upon
    contribution_norm_P: Tensor
    gap_norm_P: Tensor
    attribution_P: Tensor | None = None  # where it was asked for and one expert is acted upon
    redistribution: Redistribution | None = None  # where it was asked for and routed experts are set to zero

    @staticmethod
    def of(layer: int, worlds: Worlds, routed: Routed) -> Effects:
        """With room for the norms, which births fill in."""
        weights_PK = routed.weights_TK[worlds.parent_P]
        room = routed.mixture_TD.new_empty(2, len(worlds))
        return Effects(
            layer, worlds, routed.index_TK[worlds.parent_P], (weights_PK * worlds.members_PK).sum(1), room[0], room[1]
        )


def redistributes(request: Request, worlds: Worlds) -> bool:
    """Whether a :class:`Redistribution` of these worlds is asked for."""
    intervention = worlds.intervention
    return request.redistribution and intervention.kind == "zero" and intervention.target.selection != "shared"


@dataclass(frozen=True, slots=True)
class Repeats:
    """Effects computed a second time under another rounding (``audit.engine.repeats``).

    Numbers are places among the outcomes of the :class:`Result`. A chosen effect is not found where the other rounding
    routes the token to other experts: there is then no such effect.
    """

    chosen: Sequence[int]
    found: Sequence[int]
    outcomes: Outcomes  # of those found, in their order


@dataclass(slots=True)
class Result:
    """Effects in order; row i of ``outcomes`` belongs to effect i counted through all of ``effects``."""

    effects: list[Effects]
    baseline: BaselineScores
    outcomes: Outcomes
    changed_P: Tensor  # bool: an identity world that was routed to other experts somewhere above
    skipped: int = 0  # targets with nothing to act upon
    repeats: Repeats | None = None  # None where nothing was chosen to be repeated
