"""Counterfactual worlds of one layer: which interventions apply to which token, and the MoE output each leads to.

Shapes: T clean rows, M audited rows, K slots, R draws, E experts, D hidden, P worlds (one virtual token each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audit.calibration import Calibration
from audit.interventions import Intervention
from audit.observations.hashing import hash_words, token_key

IDENTITY = Intervention("scale", factor=1.0)
_RANDOM_TARGET = 1  # sets the hash apart from that of stored outputs: chosen experts say nothing about what is drawn


@dataclass(slots=True)
class Worlds:
    """The worlds of one intervention at one layer, ordered by the clean row they stand at."""

    intervention: Intervention
    identity: bool
    parent_P: Tensor  # clean row
    members_PK: Tensor  # bool: the slots acted upon; none for identity and shared
    expert_P: Tensor  # the expert acted upon where it is one, else -1
    slot_P: Tensor  # its slot; -1 where it is not active (sequence scope), or not one expert
    draw_P: Tensor  # 0 but where chance decides
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


@dataclass(frozen=True, slots=True, eq=False)
class Criteria:
    """What ``random`` and ``ranked`` targets of one layer are chosen by, beside the routing."""

    layer: int
    token_T: tuple[Tensor, Tensor]  # sequence number and position of each clean row
    seed: int
    rankings: Mapping[str, Tensor]  # metric: oriented values [E], NaN where an expert has none

    def random_order(self, rows_M: Tensor, index_MK: Tensor, draws: int) -> Tensor:
        """A random order of each row's slots [M, R, K], one per draw; a set of any size is the beginning of it."""
        token_M = token_key(self.token_T[0][rows_M], self.token_T[1][rows_M])
        draw_R1 = torch.arange(draws, device=rows_M.device)[:, None]
        # By expert, not by slot: which slot an expert stands in may hang on the last bit of its routing weight.
        hash_MRK = hash_words(
            _RANDOM_TARGET, self.seed, self.layer, token_M[:, None, None], draw_R1, index_MK[:, None].long()
        )
        return hash_MRK.argsort(dim=-1)

    def ranked_order(self, metric: str, index_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's slots [M, K] by descending value, equal values by expert id; which rows [M] lack no value."""
        value_E = self.rankings[metric]
        rank_E = value_E.argsort(descending=True, stable=True).argsort()
        return rank_E[index_MK].argsort(dim=1), ~value_E[index_MK].isnan().any(1)


def worlds_of(
    intervention: Intervention,
    rows_M: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    missing: Sequence[int] = (),
    criteria: Criteria | None = None,
) -> Worlds:
    """The worlds of ``intervention`` at the audited rows, given each row's routing.

    ``missing`` are experts without calibration, which ``mean`` and ``resample`` cannot act upon. ``criteria`` are
    needed for ``random`` and ``ranked`` targets; a row that has an active expert without a value is not ranked but
    skipped, whatever the count.
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
        draw = torch.zeros_like(parent)
    else:
        chosen_MRK, ranked_M = _sets(intervention, rows_M, index_MK, weights_MK, criteria)
        keep = ranked_M[:, None] & ~(chosen_MRK & ~usable_MK[:, None]).any(2)
        if target.selection == "listed":
            keep &= chosen_MRK.any(2)
            if intervention.kind == "renormalize":
                keep &= ~chosen_MRK.all(2)
        parent = rows_M[:, None].expand(keep.shape)[keep]
        draw = torch.arange(keep.shape[1], device=device).expand(keep.shape)[keep]
        members_PK, skipped = chosen_MRK[keep], int((~keep).sum())
        slot = expert = torch.full_like(parent, -1)
    # Where chance decides what is put in an expert's place and not which expert it is, every draw has the same sets.
    again = 1 if target.selection == "random" else intervention.draws
    return Worlds(
        intervention,
        False,
        parent.repeat_interleave(again),
        members_PK.repeat_interleave(again, 0),
        expert.repeat_interleave(again),
        slot.repeat_interleave(again),
        draw.repeat_interleave(again) + torch.arange(again, device=device).repeat(len(parent)),
        skipped,
    )


def _sets(
    intervention: Intervention, rows_M: Tensor, index_MK: Tensor, weights_MK: Tensor, criteria: Criteria | None
) -> tuple[Tensor, Tensor]:
    """The slots acted upon [M, R, K], R being 1 but for ``random``; which rows [M] have what they are chosen by."""
    target = intervention.target
    known_M = torch.ones_like(rows_M, dtype=torch.bool)
    none_MK = torch.zeros_like(index_MK, dtype=torch.bool)
    if target.selection == "all":
        return ~none_MK[:, None], known_M
    if target.selection == "shared":
        return none_MK[:, None], known_M
    if target.selection == "listed":
        return torch.isin(index_MK, torch.tensor(target.experts, device=index_MK.device))[:, None], known_M
    if target.selection == "random":
        assert criteria is not None
        order_MRK = criteria.random_order(rows_M, index_MK, intervention.draws)
    elif target.selection == "ranked":
        assert criteria is not None
        assert target.metric is not None
        order_MK, known_M = criteria.ranked_order(target.metric, index_MK)
        order_MRK = order_MK[:, None]
    else:
        order_MRK = weights_MK.argsort(dim=1, descending=target.selection == "highest", stable=True)[:, None]
    chosen_MRK = torch.zeros_like(order_MRK, dtype=torch.bool)
    return chosen_MRK.scatter_(2, order_MRK[..., : target.count], True), known_M


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
    criteria: Criteria | None = None,
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
    draws = range(intervention.draws)
    nobody = torch.zeros(T, K, dtype=torch.bool, device=parent_T.device)
    acted: list[tuple[int, int, Tensor]]  # expert where it is one, draw, members [T, K]
    if identity:
        acted = [(-1, 0, nobody)]
    elif intervention.target.selection == "each":
        active = torch.unique(index if all_positions else index[audited_T])
        wanted = [e for e in active.tolist() if intervention.target.experts is None or e in intervention.target.experts]
        experts = [e for e in wanted if e not in missing]
        skipped = len(wanted) - len(experts)
        acted = [(e, draw, index == e) for e in experts for draw in draws]
    else:
        whole = worlds_of(intervention, parent_T, index_TK, weights_TK, missing, criteria)
        skipped = whole.skipped
        acted = []
        for draw in draws:
            members, drawn = nobody.clone(), whole.draw_P == draw
            members[whole.parent_P[drawn] - rows[0]] = whole.members_PK[drawn]
            acted.append((-1, draw, members))
    cases: list[Case] = []
    for expert, draw, members in acted:
        read = torch.nonzero(audited_T & (members.any(1) | everywhere)).flatten()
        slot = torch.where(members.any(1) & (expert >= 0), members.int().argmax(1), -1)
        whom, which = torch.full_like(parent_T, expert), torch.full_like(parent_T, draw)
        if len(read):
            cases.append(Case(Worlds(intervention, identity, parent_T, members, whom, slot, which), read))
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
