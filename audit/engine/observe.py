"""The clean pass: what every expert is given and returns on real tokens, without intervening.

Shapes: T tokens of a sequence, K slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audit.calibration import Calibration
from audit.corpus import TokenSequence
from audit.models.moe_model import MoEModel
from audit.models.seam import first_tensor, replaced
from audit.observations import Observations, Reservoir


def observe(
    model: MoEModel,
    sequences: Sequence[TokenSequence],
    domains: Sequence[str],
    *,
    stored_outputs: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Observations of every MoE layer on ``sequences``; with ``stored_outputs``, also a reservoir of that many
    per expert.

    The model runs by its own forward, one sequence at a time, each layer twice: with the routed experts, and
    without them for the residual stream that ``easy_ep`` compares with.
    """
    experts = model.description.experts
    reservoir = Reservoir(experts, stored_outputs, seed) if stored_outputs else None
    calibration = Calibration(Observations(domains, experts), reservoir)
    with model.kernels(), model.own_attention():
        for sequence in sequences:
            _observe_one(model, sequence, list(domains).index(sequence.domain), calibration)
    return calibration


def _observe_one(model: MoEModel, sequence: TokenSequence, domain: int, calibration: Calibration) -> None:
    ids = torch.from_numpy(sequence.token_ids).to(model.device)
    T = len(ids)

    def watched(layer: int) -> Callable[..., Any]:
        site, path, own = model.sites[layer], model.experts[layer], model.layers[layer].forward
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def experts(x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            outputs, mixture = path.both(x_TD, index_TK, weights_TK)
            seen.append((index_TK, weights_TK, outputs))
            return mixture

        def forward(*args: Any, **kwargs: Any) -> Any:
            with model.shard.visit(layer):
                with replaced({site.experts: lambda x, index, weights: torch.zeros_like(x)}):
                    before = first_tensor(own(*args, **kwargs))
                with replaced({site.experts: experts}):
                    output = own(*args, **kwargs)
            index_TK, weights_TK, outputs_TKD = seen.pop()
            calibration.add(
                layer,
                domain_N=torch.full((T,), domain, device=ids.device),
                sequence_N=torch.full((T,), sequence.index, device=ids.device),
                position_N=torch.arange(T, device=ids.device),
                index_NK=index_TK,
                weight_NK=weights_TK,
                output_NKD=outputs_TKD,
                hidden_before_ND=before.reshape(T, -1),
                hidden_after_ND=first_tensor(output).reshape(T, -1),
            )
            return output

        return forward

    forwards: dict[nn.Module, Callable[..., Any]] = {model.layers[layer]: watched(layer) for layer in model.sites}
    with replaced(forwards):
        model.module(input_ids=ids[None], use_cache=False)
