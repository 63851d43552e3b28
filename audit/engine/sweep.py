"""The sweep: every exact effect of interventions at single tokens, in one pass over the layers.

With an intervention at (layer l, position t) read at t, nothing before t and nothing below l changes. Only one token
has to be computed again above l, against the clean keys and values before t: a *virtual token*. A sweep carries the
clean tokens and all virtual tokens through the layers together. At each audited layer virtual tokens are born with
the MoE output under do(.); after the last layer the model's own norm and head give the outcomes. Each layer's weights
are visited once.

Shapes: T clean rows, M audited rows, P virtual tokens, R rows of a micro-batch, K slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audit.engine.attribution import LossGradients, acts_on_one_expert
from audit.engine.birth import CleanLayer, bear, run_clean
from audit.engine.readout import Readout, next_tokens
from audit.engine.result import Effects, Redistribution, Request, Result, redistributes
from audit.engine.worlds import Routed, Worlds, identity_worlds, worlds_of
from audit.interventions import Intervention
from audit.models.moe_model import MoEModel
from audit.models.rows import Rows
from audit.models.seam import replaced


class Virtual:
    """The virtual tokens of a sweep, in order of birth."""

    def __init__(self, room: int, like_TD: Tensor) -> None:
        device = like_TD.device
        self.hidden_PD = like_TD.new_empty(room, like_TD.shape[1])
        self.parent_P = torch.empty(room, dtype=torch.long, device=device)
        self.identity_P = torch.zeros(room, dtype=torch.bool, device=device)
        self.changed_P = torch.zeros(room, dtype=torch.bool, device=device)
        self.alive = 0

    def add(self, worlds: Worlds) -> slice:
        """Room for newly born ones; returns their places."""
        born = slice(self.alive, self.alive + len(worlds))
        self.parent_P[born], self.identity_P[born] = worlds.parent_P, worlds.identity
        self.alive = born.stop
        return born

    def by_position(self) -> Tensor:
        """Places of the living ordered by clean row, so that a micro-batch holds neighbours and sees few
        keys in vain.
        """
        return torch.argsort(self.parent_P[: self.alive], stable=True)


def sweep(model: MoEModel, request: Request, micro_batch: int, gradients: LossGradients | None = None) -> Result:
    """All effects of a token-scope request. ``micro_batch`` rows go through a layer at once; it decides low
    bits only. With ``gradients`` also every expert's attribution.
    """
    rows = Rows(model.module, model.layers, model.position_dims, request.sequences, micro_batch)
    hidden_TD = rows.embedded_TD
    virtual = Virtual(_room(model, request), hidden_TD)
    effects: list[Effects] = []
    skipped = 0
    for layer in range(len(model.layers)):
        with model.shard.visit(layer):
            clean = CleanLayer(layer, hidden_TD, rows.prefixes(layer))
            hidden_TD = run_clean(model, rows, clean, keep=layer in request.layers)
            _carry(model, rows, clean, virtual, micro_batch)
            if layer not in request.layers:
                continue
            for worlds in _worlds(request, layer, clean.seen):
                skipped += worlds.skipped
                if len(worlds):
                    effects.append(_births(model, rows, clean, worlds, virtual, request, micro_batch, gradients))
    readout = Readout(model.head, hidden_TD, request.rows_M, next_tokens(request.sequences))
    outcomes = readout.empty(virtual.alive)
    order, row_P = virtual.by_position(), torch.searchsorted(request.rows_M, virtual.parent_P[: virtual.alive])
    for place_R in torch.split(order, micro_batch):
        readout.read(virtual.hidden_PD[place_R], row_P[place_R], outcomes, place_R)
    return Result(effects, readout.baseline.scores, outcomes, virtual.changed_P[: virtual.alive], skipped)


def _worlds(request: Request, layer: int, routed: Routed) -> list[Worlds]:
    """The worlds of every intervention of the request at one layer, identity controls last."""
    criteria = request.criteria(layer, request.token_T)
    asked = [
        worlds_of(i, request.rows_M, routed.index_TK, routed.weights_TK, request.missing(i, layer), criteria)
        for i in request.interventions
    ]
    if request.only is not None:
        return [worlds[request.wanted(layer, worlds, routed.index_TK[worlds.parent_P])] for worlds in asked]
    return [*asked, identity_worlds(request.rows_M, routed.index_TK.shape[1], request.identity_every)]


def worlds_per_row(intervention: Intervention, top_k: int) -> int:
    """Virtual tokens per audited token and layer, at most."""
    return (top_k if intervention.target.selection == "each" else 1) * intervention.draws


def _room(model: MoEModel, request: Request) -> int:
    if request.only is not None:
        return sum(len(keys) for keys in request.only.values())
    M = len(request.rows_M)
    controls = -(-M // request.identity_every)
    return sum(
        M * sum(worlds_per_row(i, model.sites[layer].top_k) for i in request.interventions) + controls
        for layer in request.layers
    )


def _carry(model: MoEModel, rows: Rows, clean: CleanLayer, virtual: Virtual, micro_batch: int) -> None:
    """Take the living virtual tokens through the layer."""
    if not virtual.alive:
        return
    site = model.sites.get(clean.layer)
    for place_R in torch.split(virtual.by_position(), micro_batch):
        parent_R = virtual.parent_P[place_R]
        forwards = {} if site is None else {site.experts: _watched(model, clean, virtual, place_R, parent_R)}
        with replaced(forwards):
            hidden_RD = rows.run(clean.layer, virtual.hidden_PD[place_R], clean.prefixes.rows(parent_R), parent_R)
        virtual.hidden_PD.index_copy_(0, place_R, hidden_RD)


def _watched(
    model: MoEModel, clean: CleanLayer, virtual: Virtual, place_R: Tensor, parent_R: Tensor
) -> Callable[..., Tensor]:
    """The experts, noting which identity worlds were routed otherwise than their clean token."""
    mixture, routed = model.experts[clean.layer].mixture, clean.seen

    def experts(x_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        control = torch.nonzero(virtual.identity_P[place_R]).flatten()
        virtual.changed_P[place_R[control]] |= differently_routed(index_RK[control], routed.index_TK[parent_R[control]])
        return mixture(x_RD, index_RK, weights_RK)

    return experts


def differently_routed(index_RK: Tensor, clean_RK: Tensor) -> Tensor:
    """Which rows [R] are routed to another set of experts; the order of the slots does not count."""
    return (index_RK.sort(1).values != clean_RK.sort(1).values).any(1)


def _births(
    model: MoEModel,
    rows: Rows,
    clean: CleanLayer,
    worlds: Worlds,
    virtual: Virtual,
    request: Request,
    micro_batch: int,
    gradients: LossGradients | None,
) -> Effects:
    effects = Effects.of(clean.layer, worlds, clean.seen)
    born = virtual.add(worlds)
    asked = redistributes(request, worlds)
    remains: list[Redistribution] = []
    attributions: list[Tensor] = []
    for a in range(0, len(worlds), micro_batch):
        part = slice(a, min(a + micro_batch, len(worlds)))
        begun = bear(model, rows, clean, worlds[part], request.calibration, request.token_T, request.seed, asked)
        virtual.hidden_PD[born][part] = begun.hidden_PD
        effects.contribution_norm_P[part], effects.gap_norm_P[part] = begun.contribution_norm_P, begun.gap_norm_P
        if begun.redistribution is not None:
            remains.append(begun.redistribution)
        if gradients is not None and acts_on_one_expert(worlds):
            attributions.append(gradients.attribution(clean.layer, worlds[part], clean.seen))
    effects.redistribution = Redistribution.joined(remains) if remains else None
    effects.attribution_P = torch.cat(attributions) if attributions else None
    return effects
