"""What is asked of an engine, and what it answers: one form for the sweep, the suffix engine and the oracle.

Shapes: T clean rows of all sequences, M audited rows, P effects, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from audit.calibration import Calibration
from audit.engine.worlds import Routed, Worlds
from audit.interventions import NEEDS_CALIBRATION, Intervention, Scope
from audit.outcomes import Baseline, Outcomes


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

    def missing(self, intervention: Intervention, layer: int) -> list[int]:
        """Experts of the layer that ``intervention`` cannot act upon because no calibration token was
        routed to them.
        """
        if intervention.kind not in NEEDS_CALIBRATION:
            return []
        assert self.calibration is not None
        return self.calibration.missing(layer)


@dataclass(slots=True)
class Effects:
    """The effects of one intervention at one layer, without their outcomes."""

    layer: int
    worlds: Worlds
    experts_PK: Tensor  # ids of the parent's active experts
    routing_weight_P: Tensor  # summed over the experts acted upon
    contribution_norm_P: Tensor
    gap_norm_P: Tensor

    @staticmethod
    def of(layer: int, worlds: Worlds, routed: Routed) -> Effects:
        """With room for the norms, which births fill in."""
        weights_PK = routed.weights_TK[worlds.parent_P]
        room = routed.mixture_TD.new_empty(2, len(worlds))
        return Effects(
            layer, worlds, routed.index_TK[worlds.parent_P], (weights_PK * worlds.members_PK).sum(1), room[0], room[1]
        )


@dataclass(slots=True)
class Result:
    """Effects in order; row i of ``outcomes`` belongs to effect i counted through all of ``effects``."""

    effects: list[Effects]
    baseline: Baseline
    outcomes: Outcomes
    changed_P: Tensor  # bool: an identity world that was routed to other experts somewhere above
    skipped: int = 0  # targets with nothing to act upon
