"""Counterfactual worlds of one layer: which interventions apply to which token, and the MoE output each leads to.

Shapes: T clean rows, K slots, D hidden, P worlds (one virtual token each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audit.calibration import Calibration
from audit.interventions import Intervention

IDENTITY = Intervention("scale", factor=1.0)


@dataclass(slots=True)
class Worlds:
    """The worlds of one intervention at one layer, ordered by the clean row they stand at."""

    intervention: Intervention
    identity: bool
    parent_P: Tensor  # clean row
    members_PK: Tensor  # bool: the slots acted upon; none for identity and shared
    expert_P: Tensor  # the expert acted upon where it is one, else -1
    slot_P: Tensor  # its slot; -1 where it is not active (sequence scope), or not one expert
    draw_P: Tensor  # 0 but for resample
    skipped: int = 0  # targets with nothing to act upon, nothing left to carry the weight, or no calibration

    def __len__(self) -> int:
        return len(self.parent_P)

    def __getitem__(self, part: slice | Tensor) -> Worlds:
        return Worlds(
            self.intervention,
            self.identity,
            self.parent_P[part],
            self.members_PK[part],
            self.expert_P[part],
            self.slot_P[part],
            self.draw_P[part],
        )


def identity_worlds(rows_M: Tensor, top_k: int, every: int) -> Worlds:
    """Control worlds in which nothing is changed, at every ``every``-th audited row."""
    parent = rows_M[::every]
    none = torch.zeros(len(parent), top_k, dtype=torch.bool, device=rows_M.device)
    nobody = torch.full_like(parent, -1)
    return Worlds(IDENTITY, True, parent, none, nobody, nobody, torch.zeros_like(parent))


def worlds_of(
    intervention: Intervention, rows_M: Tensor, index_TK: Tensor, weights_TK: Tensor, missing: Sequence[int] = ()
) -> Worlds:
    """The worlds of ``intervention`` at the audited rows, given each row's routing.

    ``missing`` are experts without calibration, which ``mean`` and ``resample`` cannot act upon.
    """
    target = intervention.target
    index_MK, weights_MK = index_TK[rows_M], weights_TK[rows_M]
    M, K = index_MK.shape
    device = rows_M.device
    eye = torch.eye(K, dtype=torch.bool, device=device)
    usable_MK = ~torch.isin(index_MK, torch.tensor(missing, dtype=index_MK.dtype, device=device))
    single = target.selection == "each"
    if single:
        members = eye.expand(M, K, K)
        keep = torch.ones(M, K, dtype=torch.bool, device=device)
        if target.experts is not None:
            keep = torch.isin(index_MK, torch.tensor(target.experts, device=device))
        skipped = int((keep & ~usable_MK).sum())
        keep &= usable_MK
        parent = rows_M[:, None].expand(M, K)[keep]
        slot = torch.arange(K, device=device).expand(M, K)[keep]
        expert = index_MK[keep]
        members_PK = members[keep]
    else:
        if target.selection == "all":
            chosen = torch.ones(M, K, dtype=torch.bool, device=device)
        elif target.selection == "listed":
            chosen = torch.isin(index_MK, torch.tensor(target.experts, device=device))
        elif target.selection == "shared":
            chosen = torch.zeros(M, K, dtype=torch.bool, device=device)
        else:
            order = weights_MK.argsort(dim=1, descending=target.selection == "highest", stable=True)
            chosen = torch.zeros(M, K, dtype=torch.bool, device=device).scatter_(1, order[:, : target.count], True)
        keep = ~(chosen & ~usable_MK).any(1)
        if target.selection == "listed":
            keep &= chosen.any(1)
            if intervention.kind == "renormalize":
                keep &= ~chosen.all(1)
        parent, members_PK, skipped = rows_M[keep], chosen[keep], int((~keep).sum())
        slot = expert = torch.full_like(parent, -1)
    draws = torch.arange(intervention.draws, device=device)
    P = len(parent)
    return Worlds(
        intervention,
        False,
        parent.repeat_interleave(intervention.draws),
        members_PK.repeat_interleave(intervention.draws, 0),
        expert.repeat_interleave(intervention.draws),
        slot.repeat_interleave(intervention.draws),
        draws.repeat(P),
        skipped,
    )


@dataclass(slots=True)
class Case:
    """One counterfactual world in sequence scope: what is done at every token of the sequence, and where it is read."""

    done: Worlds  # one entry per token of the sequence
    read_N: Tensor  # entries of ``done`` that give a row of the effect table


def sequence_cases(
    intervention: Intervention,
    identity: bool,
    rows: tuple[int, int],
    rows_M: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    all_positions: bool,
    missing: Sequence[int] = (),
) -> tuple[list[Case], int]:
    """The worlds of ``intervention`` on the sequence of clean rows ``rows`` (first, end), read at its audited
    rows ``rows_M``.

    Worlds that would give no row, because their expert is not active at an audited position, are left out. Also how
    many targets were skipped, as in :class:`Worlds`.
    """
    parent_T = torch.arange(*rows, device=rows_M.device)
    index = index_TK[parent_T]
    T, K = index.shape
    audited_T = torch.isin(parent_T, rows_M)
    skipped = 0
    everywhere = identity or all_positions or intervention.target.selection == "shared"
    experts = [-1]
    if identity:
        acted = [torch.zeros(T, K, dtype=torch.bool, device=parent_T.device)]
    elif intervention.target.selection == "each":
        active = torch.unique(index if all_positions else index[audited_T])
        wanted = [e for e in active.tolist() if intervention.target.experts is None or e in intervention.target.experts]
        experts = [e for e in wanted if e not in missing]
        skipped = len(wanted) - len(experts)
        acted = [index == e for e in experts]
    else:
        whole = worlds_of(intervention, parent_T, index_TK, weights_TK, missing)
        skipped = whole.skipped
        members = torch.zeros(T, K, dtype=torch.bool, device=parent_T.device)
        first_draw = whole.draw_P == 0
        members[whole.parent_P[first_draw] - rows[0]] = whole.members_PK[first_draw]
        acted = [members]
    cases: list[Case] = []
    for expert, members in zip(experts, acted, strict=True):
        read = torch.nonzero(audited_T & (members.any(1) | everywhere)).flatten()
        slot = torch.where(members.any(1) & (expert >= 0), members.int().argmax(1), -1)
        for draw in range(intervention.draws):
            done = Worlds(
                intervention,
                identity,
                parent_T,
                members,
                torch.full_like(parent_T, expert),
                slot,
                torch.full_like(parent_T, draw),
            )
            if len(read):
                cases.append(Case(done, read))
    return cases, skipped


def joined(worlds: Sequence[Worlds]) -> Worlds:
    """Worlds of one intervention, one after another."""
    first = worlds[0]
    columns = zip(*((w.parent_P, w.members_PK, w.expert_P, w.slot_P, w.draw_P) for w in worlds), strict=True)
    parent, members, expert, slot, draw = (torch.cat(column) for column in columns)
    return Worlds(first.intervention, first.identity, parent, members, expert, slot, draw)


@dataclass(slots=True)
class Routed:
    """What the clean rows of one layer gave their experts, and what these returned."""

    x_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    outputs_TKD: Tensor  # un-weighted
    mixture_TD: Tensor  # y, the routed part of the MoE output

    def contribution(self, worlds: Worlds) -> Tensor:
        """Summed contribution [P, D] of the experts acted upon."""
        if (worlds.slot_P >= 0).all():
            weight = self.weights_TK[worlds.parent_P, worlds.slot_P].to(self.outputs_TKD.dtype)
            return self.outputs_TKD[worlds.parent_P, worlds.slot_P] * weight[:, None]
        return self.summed(worlds.parent_P, worlds.members_PK)

    def summed(self, parent_P: Tensor, members_PK: Tensor) -> Tensor:
        """Summed contribution [P, D] of the slots marked in ``members_PK`` at the clean rows ``parent_P``."""
        weights_PK = (self.weights_TK[parent_P] * members_PK).to(self.outputs_TKD.dtype)
        total = self.outputs_TKD.new_zeros(len(parent_P), self.mixture_TD.shape[1])
        for slot in range(weights_PK.shape[1]):
            total += self.outputs_TKD[parent_P, slot] * weights_PK[:, slot, None]
        return total


def changed_output(
    worlds: Worlds,
    routed: Routed,
    contribution_PD: Tensor,
    layer: int,
    tokens: tuple[Tensor, Tensor] | None,
    calibration: Calibration | None,
    seed: int,
) -> Tensor:
    """y' - y [P, D] for every kind but reroute and shared experts. ``tokens`` are sequence and position of
    each world.
    """
    kind = worlds.intervention.kind
    if kind == "zero":
        # Where nobody remains, exactly nothing: a norm that follows would bring a rounding error of y - c to full size.
        nobody_P1 = worlds.members_PK.all(1, keepdim=True)
        return -torch.where(nobody_P1, routed.mixture_TD[worlds.parent_P], contribution_PD)
    if kind == "scale":
        assert worlds.intervention.factor is not None
        return (worlds.intervention.factor - 1.0) * contribution_PD
    if kind == "renormalize":
        # From the remaining experts themselves: y - c has lost their digits where c carries nearly all the weight.
        weights_PK = routed.weights_TK[worlds.parent_P]
        weights_PK = weights_PK.to(torch.promote_types(weights_PK.dtype, torch.float32))
        rest_PK = ~worlds.members_PK
        ratio = (weights_PK.sum(1) / (weights_PK * rest_PK).sum(1))[:, None].to(contribution_PD.dtype)
        change_PD = ratio * routed.summed(worlds.parent_P, rest_PK) - routed.mixture_TD[worlds.parent_P]
        return change_PD.masked_fill(~worlds.members_PK.any(1, keepdim=True), 0.0)
    assert calibration is not None
    assert tokens is not None
    replacement = torch.zeros_like(contribution_PD)
    for slot in range(worlds.members_PK.shape[1]):
        at = torch.nonzero(worlds.members_PK[:, slot]).flatten()
        if not len(at):
            continue
        expert = routed.index_TK[worlds.parent_P[at], slot]
        if kind == "mean":
            stored = calibration.mean(layer).to(contribution_PD.device)[expert]
        else:
            stored = calibration.draw(layer, expert, tokens[0][at], tokens[1][at], worlds.draw_P[at], seed)
        weight = routed.weights_TK[worlds.parent_P[at], slot].to(contribution_PD.dtype)
        replacement[at] += stored.to(contribution_PD) * weight[:, None]
    return replacement - contribution_PD
