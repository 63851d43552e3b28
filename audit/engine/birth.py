"""Clean layers and births: what is kept of the clean rows, and how a counterfactual world begins.

A world begins by entering its layer again with the experts' output replaced, so that norms after the experts and
residual multipliers are the model's own. What runs before the experts or beside them is replayed from the clean rows.

Shapes: T clean rows, P worlds, K slots, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from audit.calibration import Calibration
from audit.engine.result import Redistribution
from audit.engine.worlds import Routed, Worlds, changed_output
from audit.models.attention import Prefixes
from audit.models.discovery import ModelError, Site
from audit.models.moe_model import MoEModel
from audit.models.router import Strike, correction_biases
from audit.models.rows import Rows
from audit.models.seam import first_tensor, map_tensors, replaced, with_first


@dataclass(slots=True)
class CleanLayer:
    """What is kept of the clean rows at one layer until its worlds have begun."""

    layer: int
    hidden_TD: Tensor  # what the layer was given
    prefixes: Prefixes
    routed: Routed | None = None
    replies: dict[nn.Module, Any] = field(default_factory=dict)

    @property
    def seen(self) -> Routed:
        """What the layer's experts were given and returned. Raises ModelError where they were not called."""
        if self.routed is None:
            raise ModelError(f"model: layer {self.layer} ran without calling its experts; nothing can be removed there")
        return self.routed


@dataclass(slots=True)
class Born:
    """The layer's output for the worlds, and how far the MoE output moved."""

    hidden_PD: Tensor
    contribution_norm_P: Tensor
    gap_norm_P: Tensor
    redistribution: Redistribution | None


def run_clean(model: MoEModel, rows: Rows, clean: CleanLayer, keep: bool) -> Tensor:
    """The layer's output [T, D] for the clean rows; with ``keep``, ``clean`` then holds what :func:`bear` needs."""
    layer = clean.layer
    site = model.sites.get(layer)
    if site is None:
        return rows.run(layer, clean.hidden_TD, clean.prefixes.rows(None))
    path = model.experts[layer]

    def experts(x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        outputs, mixture = (
            path.both(x_TD, index_TK, weights_TK) if keep else (x_TD[:, None], path.mixture(x_TD, index_TK, weights_TK))
        )
        clean.routed = Routed(x_TD, index_TK, weights_TK, outputs, mixture)
        return mixture

    forwards: dict[nn.Module, Callable[..., Any]] = {site.experts: experts}
    if keep:
        for module in (*model.attention_modules[layer], site.router, site.shared, site.block):
            if module is not None and module not in forwards:
                forwards[module] = _recording(module, clean.replies)
    with replaced(forwards):
        return rows.run(layer, clean.hidden_TD, clean.prefixes.rows(None))


def bear(
    model: MoEModel,
    rows: Rows,
    clean: CleanLayer,
    worlds: Worlds,
    calibration: Calibration | None,
    token_T: tuple[Tensor, Tensor],
    seed: int,
    redistribution: bool = False,
) -> Born:
    """Begin ``worlds`` at the layer of ``clean``. ``token_T`` names each clean row: sequence number and position.

    With ``redistribution``, which goes with ``zero`` of routed experts, also what remains beside what went.
    """
    site, routed, parent = model.sites[clean.layer], clean.seen, worlds.parent_P
    forwards = {m: _replaying(reply, parent) for m, reply in clean.replies.items() if m is not site.block}
    contribution_norm = gap_norm = None
    gap: list[Tensor] = []
    remains = None
    if worlds.intervention.target.selection == "shared":
        assert site.shared is not None
        factor = worlds.intervention.factor or 0.0  # zero has none
        reply = forwards[site.shared]
        forwards[site.shared] = lambda *args, **kwargs: _scaled(reply(), factor)
        forwards[site.experts] = lambda *args: routed.mixture_TD[parent]
        if _shared_inside(site):
            forwards[site.block] = _comparing(site.block, clean.replies, parent, gap)
        else:  # Granite: the shared experts stand beside the block
            gap.append((factor - 1.0) * _rows(first_tensor(clean.replies[site.shared]))[parent])
    elif worlds.intervention.kind == "reroute":
        removed_PE = torch.zeros(len(parent), site.num_experts, dtype=torch.bool, device=parent.device)
        removed_PE.scatter_(1, routed.index_TK[parent], worlds.members_PK)
        forwards.update(_rerouting(model, clean.layer, removed_PE, routed.mixture_TD[parent], gap))
        contribution_norm = torch.linalg.vector_norm(routed.contribution(worlds), dim=-1)
    else:
        contribution_PD = routed.contribution(worlds)
        contribution_norm = torch.linalg.vector_norm(contribution_PD, dim=-1)
        tokens = (token_T[0][parent], token_T[1][parent])
        change_PD = changed_output(worlds, routed, contribution_PD, clean.layer, tokens, calibration, seed)
        gap.append(change_PD)
        changed_PD = routed.mixture_TD[parent] + change_PD
        forwards[site.experts] = lambda *args: changed_PD
        if redistribution:
            remains = Redistribution.of(-change_PD, changed_PD, _shared_output(site, clean, parent))
    with replaced(forwards):
        hidden = rows.run(clean.layer, clean.hidden_TD[parent], clean.prefixes.rows(parent), parent)
    gap_norm = torch.linalg.vector_norm(gap[0], dim=-1)
    if contribution_norm is None:  # of the shared experts: what a factor of 0 would have moved
        contribution_norm = gap_norm / abs(1.0 - factor) if factor != 1.0 else torch.full_like(gap_norm, float("nan"))
    return Born(hidden, contribution_norm, gap_norm, remains)


def _rerouting(
    model: MoEModel, layer: int, removed_PE: Tensor, mixture_PD: Tensor, gap: list[Tensor]
) -> dict[nn.Module, Callable[..., Any]]:
    """The router with experts struck, and experts that follow its new choice."""
    site, path = model.sites[layer], model.experts[layer]
    assert site.router is not None
    choose = site.router.forward
    biases = correction_biases(site.block, site.num_experts)

    def router(*args: Any, **kwargs: Any) -> Any:
        with Strike(removed_PE, biases):
            return choose(*args, **kwargs)

    def experts(x_PD: Tensor, index_PK: Tensor, weights_PK: Tensor) -> Tensor:
        mixture = path.mixture(x_PD, index_PK, weights_PK)
        gap.append(mixture - mixture_PD)
        return mixture

    return {site.router: router, site.experts: experts}


def _recording(module: nn.Module, replies: dict[nn.Module, Any]) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        replies[module] = own(*args, **kwargs)
        return replies[module]

    return forward


def _replaying(reply: Any, parent_P: Tensor) -> Callable[..., Any]:
    # [T, ...] from routers and some shared experts, [1, T, D] from attention and the others.
    return lambda *args, **kwargs: map_tensors(
        reply, lambda tensor: tensor.index_select(0 if tensor.dim() == 2 else 1, parent_P)
    )


def _shared_inside(site: Site) -> bool:
    """Whether the shared experts stand within the block of the routed ones, as in all families but Granite's."""
    return any(child is site.shared for child in site.block.modules())


def _shared_output(site: Site, clean: CleanLayer, parent_P: Tensor) -> Tensor | None:
    """What the layer's shared experts add to the routed ones [P, D], any gate included."""
    if site.shared is None:
        return None
    if not _shared_inside(site):
        return _rows(first_tensor(clean.replies[site.shared]))[parent_P]
    return _rows(first_tensor(clean.replies[site.block]))[parent_P] - clean.seen.mixture_TD[parent_P]


def _scaled(output: Any, factor: float) -> Any:
    return with_first(output, first_tensor(output) * factor)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _comparing(
    block: nn.Module, replies: dict[nn.Module, Any], parent_P: Tensor, gap: list[Tensor]
) -> Callable[..., Any]:
    own, before = block.forward, _rows(first_tensor(replies[block]))

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        gap.append(_rows(first_tensor(output)) - before[parent_P])
        return output

    return forward
