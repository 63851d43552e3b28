"""Attribution: a first-order estimate of what removing an expert does to the loss at its own token, from one backward.

The attribution of expert i at (layer l, token t) is <dL_t/dy_t, -c_i>: L_t the loss at t alone (nats), y_t the routed
experts' output there, c_i the expert's contribution. It needs dL_t/dy_t for every token by itself. A backward of the
summed loss gives something else: it adds what t does to later tokens through attention. Here every token t is a virtual
token that attends to *detached* clean keys and values before t and to itself, so tokens do not reach each other and one
backward of the sum over them gives each its own gradient, at every audited layer.

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
    """The gradients of every audited token's own loss, ``micro_batch`` tokens at a time.

    Upwards each layer keeps what it was given; downwards it runs again, with gradients. So every layer is visited
    twice, and no more than one layer's activations are held.
    """
    found = LossGradients.empty(model, request)
    target_M = next_tokens(request.sequences)[request.rows_M]
    first = min(request.layers)
    m_R = torch.nonzero(target_M >= 0).flatten()
    row_R, target_R = request.rows_M[m_R], target_M[m_R]
    parts = [slice(a, min(a + micro_batch, len(row_R))) for a in range(0, len(row_R), micro_batch)]
    with torch.inference_mode(False), torch.no_grad():
        rows = Rows(model.module, model.layers, model.position_dims, request.sequences, micro_batch)
        climb = _climb(model, rows, first, row_R, parts)
        gradient_RD = torch.empty_like(climb.last_RD)
        for part in parts:
            gradient_RD[part] = _loss_gradient(model, climb.last_RD[part], target_R[part])
        for layer in reversed(list(climb.given_RD)):
            experts = model.sites[layer].experts if layer in request.layers else None
            with model.shard.visit(layer):
                for part in parts:
                    attention = DifferentiableAttention(climb.prefixes[layer], row_R[part])
                    gradient_RD[part], probed_RD = _descend(
                        rows, layer, climb.given_RD[layer][part], attention, row_R[part], experts, gradient_RD[part]
                    )
                    if probed_RD is not None:
                        found.by_layer_MD[layer][m_R[part]] = probed_RD
            del climb.given_RD[layer], climb.prefixes[layer]
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


@dataclass(slots=True, eq=False)
class _Climb:
    """What the audited tokens' rows were given in each layer from the first audited one up, and what came out."""

    given_RD: dict[int, Tensor]
    prefixes: dict[int, Prefixes]
    last_RD: Tensor


def _climb(model: MoEModel, rows: Rows, first: int, row_R: Tensor, parts: list[slice]) -> _Climb:
    given_RD: dict[int, Tensor] = {}
    prefixes: dict[int, Prefixes] = {}
    clean_TD, hidden_RD = rows.embedded_TD, rows.embedded_TD[:0]
    for layer in range(len(model.layers)):
        with model.shard.visit(layer):
            if layer == first:
                hidden_RD = clean_TD[row_R].clone()
            with model.kernels():
                clean = CleanLayer(layer, clean_TD, rows.prefixes(layer))
                clean_TD = run_clean(model, rows, clean, keep=False)
            if layer < first:
                continue
            prefix = prefixes[layer] = clean.prefixes  # copies: what inference mode made cannot be saved for a backward
            prefix.keys = {module: key.clone() for module, key in prefix.keys.items()}
            prefix.values = {module: value.clone() for module, value in prefix.values.items()}
            given_RD[layer], hidden_RD = hidden_RD, torch.empty_like(hidden_RD)
            for part in parts:
                attention = DifferentiableAttention(prefix, row_R[part])
                hidden_RD[part] = rows.run(layer, given_RD[layer][part], attention, row_R[part])
    return _Climb(given_RD, prefixes, hidden_RD)


@torch.enable_grad()
def _loss_gradient(model: MoEModel, hidden_RD: Tensor, target_R: Tensor) -> Tensor:
    """Gradients [R, D] of each row's own loss with respect to the last layer's output."""
    hidden_RD = hidden_RD.detach().requires_grad_()
    logits_RV = model.head.logits(hidden_RD)
    loss = F.cross_entropy(logits_RV.to(_wide(logits_RV.dtype)), target_R, reduction="sum")
    return torch.autograd.grad(loss, hidden_RD)[0]


@torch.enable_grad()
def _descend(
    rows: Rows,
    layer: int,
    given_RD: Tensor,
    attention: PrefixAttention,
    row_R: Tensor,
    experts: nn.Module | None,
    gradient_RD: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """From the gradients at a layer's output those at its input, and those at its experts' output where asked for."""
    given_RD = given_RD.detach().requires_grad_()
    probes: dict[int, Tensor] = {}
    with replaced({} if experts is None else {experts: _probed(experts, layer, probes)}):
        out_RD = rows.run(layer, given_RD, attention, row_R)
    found = torch.autograd.grad(out_RD, [given_RD, *probes.values()], gradient_RD)
    return found[0], found[1] if probes else None


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
