"""Attribution: a first-order estimate of what removing an expert does to the loss at its own token, from one backward.

The attribution of expert i at (layer l, token t) is <dL_t/dy_t, -c_i>: L_t the loss at t alone (nats), y_t the routed
experts' output there, c_i the expert's contribution. It needs dL_t/dy_t for every token by itself. A backward of the
summed loss gives something else: it adds what t does to later tokens through attention. Here every token t is a virtual
token that attends to *detached* clean keys and values before t and to itself, so tokens do not reach each other and one
backward of the sum over them gives each its own gradient, at every audited layer at once.

The rows with gradients run through the model's own experts module and torch's own linear maps: the sweep's kernels and
its attention, which overwrites its weights, know no backward. Clean rows run as in the sweep. Source: this project.

Shapes: T clean rows, M audited rows, R rows of one backward, J keys of a block, H query heads, G key heads, C head
width, P worlds, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audit.engine.birth import CleanLayer, run_clean
from audit.engine.readout import next_tokens
from audit.engine.result import Request
from audit.engine.worlds import Routed, Worlds
from audit.models.attention import PrefixAttention, Prefixes
from audit.models.moe_model import MoEModel
from audit.models.rows import Rows
from audit.models.seam import first_tensor, replaced, with_first


@dataclass(frozen=True, slots=True, eq=False)
class LossGradients:
    """dL_t/dy_t [M, D] of every audited layer; NaN where a token has no next one."""

    rows_M: Tensor
    by_layer_MD: dict[int, Tensor]

    @staticmethod
    def empty(model: MoEModel, request: Request) -> LossGradients:
        """With room for the gradients of ``request``, all of them NaN."""
        shape = (len(request.rows_M), model.description.hidden_size)
        room = {
            layer: torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
            for layer in sorted(request.layers)
        }
        return LossGradients(request.rows_M, room)

    def attribution(self, layer: int, worlds: Worlds, routed: Routed) -> Tensor:
        """<dL_t/dy_t, -c> [P] of the experts acted upon, nats."""
        gradient_PD = self.by_layer_MD[layer][torch.searchsorted(self.rows_M, worlds.parent_P)]
        wide = _wide(gradient_PD.dtype)
        return -(gradient_PD.to(wide) * routed.contribution(worlds).to(wide)).sum(-1)


def loss_gradients(model: MoEModel, request: Request, micro_batch: int) -> LossGradients:
    """The gradients of every audited token's own loss, ``micro_batch`` tokens per backward."""
    found = LossGradients.empty(model, request)
    target_M = next_tokens(request.sequences)[request.rows_M]
    first = min(request.layers)
    with torch.inference_mode(False), torch.no_grad():
        rows = Rows(model.module, model.layers, model.position_dims, request.sequences)
        hidden_TD, prefixes = _clean(model, rows, first)
        for m_R in torch.split(torch.nonzero(target_M >= 0).flatten(), micro_batch):
            with torch.enable_grad():
                gradients = _backward(
                    model, rows, prefixes, hidden_TD, request.rows_M[m_R], target_M[m_R], request.layers
                )
            for layer, gradient_RD in gradients.items():
                found.by_layer_MD[layer][m_R] = gradient_RD
    return found


def own_loss_gradients(model: MoEModel, request: Request) -> LossGradients:
    """The same gradients by one backward per token through the whole model: slow, obvious, for every family."""
    found = LossGradients.empty(model, request)
    start = 0
    with torch.inference_mode(False), torch.enable_grad(), model.own_attention():
        for ids in request.sequences:
            inside = (request.rows_M >= start) & (request.rows_M < start + len(ids) - 1)
            probes: dict[int, Tensor] = {}
            with replaced({model.sites[i].experts: _probed(model.sites[i].experts, i, probes) for i in request.layers}):
                logits_TV = model.module(input_ids=ids[None], use_cache=False).logits[0]
            loss_T = F.cross_entropy(logits_TV[:-1].to(_wide(logits_TV.dtype)), ids[1:], reduction="none")
            for m in torch.nonzero(inside).flatten().tolist():
                t = int(request.rows_M[m]) - start
                gradients = torch.autograd.grad(loss_T[t], list(probes.values()), retain_graph=True)
                for layer, gradient_TD in zip(probes, gradients, strict=True):
                    found.by_layer_MD[layer][m] = gradient_TD[t]
            start += len(ids)
    return found


def acts_on_one_expert(worlds: Worlds) -> bool:
    """Whether each world acts upon one routed expert: attribution is that of single experts."""
    return not worlds.identity and worlds.intervention.target.selection == "each"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _clean(model: MoEModel, rows: Rows, first: int) -> tuple[Tensor, dict[int, Prefixes]]:
    """What layer ``first`` is given at the clean rows, and the keys and values of the layers from there on."""
    prefixes: dict[int, Prefixes] = {}
    with model.kernels():
        hidden_TD = given_TD = rows.embedded_TD
        for layer in range(len(model.layers)):
            clean = CleanLayer(layer, hidden_TD, rows.prefixes(layer))
            given_TD = hidden_TD if layer == first else given_TD
            hidden_TD = run_clean(model, rows, clean, keep=False)
            if layer >= first:
                prefixes[layer] = clean.prefixes
    for kept in prefixes.values():  # copies: what inference mode made cannot be saved for a backward
        kept.keys = {module: key.clone() for module, key in kept.keys.items()}
        kept.values = {module: value.clone() for module, value in kept.values.items()}
    return given_TD.clone(), prefixes


def _backward(
    model: MoEModel,
    rows: Rows,
    prefixes: dict[int, Prefixes],
    hidden_TD: Tensor,
    row_R: Tensor,
    target_R: Tensor,
    layers: frozenset[int],
) -> dict[int, Tensor]:
    """Gradients [R, D] by layer of each row's own loss with respect to its experts' output."""
    hidden_RD = hidden_TD[row_R]
    probes: dict[int, Tensor] = {}
    for layer, prefix in prefixes.items():
        experts = model.sites[layer].experts if layer in layers else None
        with replaced({} if experts is None else {experts: _probed(experts, layer, probes)}):
            hidden_RD = rows.run(layer, hidden_RD, DifferentiableAttention(prefix, row_R), row_R)
    logits_RV = model.head.logits(hidden_RD)
    loss = F.cross_entropy(logits_RV.to(_wide(logits_RV.dtype)), target_R, reduction="sum")
    return dict(zip(probes, torch.autograd.grad(loss, list(probes.values())), strict=True))


def _probed(experts: nn.Module, layer: int, probes: dict[int, Tensor]) -> Callable[..., Any]:
    """The experts with a zero added to their output: the gradient at the zero is the gradient at the output."""
    own = experts.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        y_RD = first_tensor(output)
        probes[layer] = torch.zeros_like(y_RD, requires_grad=True)
        return with_first(output, y_RD + probes[layer])

    return forward


class DifferentiableAttention(PrefixAttention):
    """The sweep's attention for virtual tokens, written without overwriting: clean keys strictly before the row, then
    the row's own as one more column.
    """

    def _block(
        self,
        q: Tensor,
        k_own: Tensor,
        v_own: Tensor,
        keys: Tensor,
        values: Tensor,
        a: int,
        b: int,
        low: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        H, R, C = q.shape
        G, J = keys.shape[:2]
        grouped = q.reshape(G, H // G, R, C) * scaling
        before = torch.matmul(grouped.reshape(G, -1, C), keys.transpose(1, 2)).view(G, H // G, R, J)
        own = (grouped * k_own[:, None]).sum(-1, keepdim=True)
        scores = torch.cat([before, own], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        key_J = torch.arange(J, device=q.device) + low
        row_R = self.parent_R[a:b, None]
        unseen_RJ = (key_J >= row_R) | (key_J < self.prefixes.first_T[row_R])
        scores = scores.masked_fill(F.pad(unseen_RJ, (0, 1)), float("-inf"))
        if sinks is not None:
            sink = sinks.reshape(G, H // G, 1, 1).to(scores.dtype).expand(G, H // G, R, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        out = torch.matmul(weights[..., :J].reshape(G, -1, J), values).view(G, H // G, R, -1)
        return (out + weights[..., J : J + 1] * v_own[:, None]).view(H, R, -1)
