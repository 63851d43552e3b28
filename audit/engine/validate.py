"""Validate a model when it is loaded: what the audit assumes of it is tried on a few probe tokens.

The loss is the library's own; nothing changes under the identity; something changes under a real intervention; the
sweep agrees with whole forwards; the router chooses again as it should when an expert is struck. A model for which
the sweep does not hold falls back to the oracle, with the reason in its description; a model for which the oracle
does not is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audit.corpus import TokenSequence
from audit.engine.engine import Engine
from audit.interventions import Intervention
from audit.models.description import text_config
from audit.models.discovery import ModelError, Site
from audit.models.loading import load_model
from audit.models.moe_model import MoEModel
from audit.models.router import Strike, correction_biases, verify
from audit.models.seam import replaced
from audit.models.shards.shard import ModelShard

log = logging.getLogger(__name__)

_PROBE_TOKENS = 24
_AUDITED = np.array([0, 7, 8, 22])  # the first, neighbours, the last with a next token
# Relative distance of losses, largest KL of an identity, distance of an effect from the oracle's (nats, relative
# above 1).
_TOLERANCES = {
    torch.float64: (1e-5, 1e-7, 1e-5),
    torch.float32: (1e-4, 1e-6, 1e-3),
    torch.bfloat16: (3e-2, 5e-2, 0.3),
    torch.float16: (1e-2, 1e-2, 0.1),
}


def load(source: str = "demo", **options: Any) -> MoEModel:
    """A checkpoint (folder, hub name, or the embedded ``demo``), loaded and validated. Options as of
    ``models.load_model``.

    Raises ModelError, one sentence, where it cannot be read or audited.
    """
    return validate(load_model(source, **options))


def validate(model: MoEModel) -> MoEModel:
    """Try the model on probe tokens; sets ``reroute_refused`` and, where the sweep does not hold, the oracle
    as engine.
    """
    probe = _probe_sequence(model)
    layers = [model.description.moe_layers[0], model.description.moe_layers[-1]]
    if model.description.engine == "sweep":
        reason = _sweep_fails(model, probe, layers)
        if reason is not None:
            log.warning("%s: the sweep is not used, %s", model.description.source, reason)
            model.description = dataclasses.replace(model.description, engine="oracle", engine_reason=reason)
    if model.description.engine == "oracle":
        reason = _basics_fail(model, probe, layers, "oracle")
        if reason is not None:
            raise ModelError(f"model: {model.description.source} cannot be audited, {reason}")
    model.reroute_refused = _reroute_fails(model, probe)
    return model


def _probe_sequence(model: MoEModel) -> TokenSequence:
    vocabulary = int(text_config(model.module.config).vocab_size)
    ids = torch.randint(0, vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(1)).numpy()
    zeros = np.zeros(_PROBE_TOKENS, dtype=np.int32)
    return TokenSequence(0, 0, "probe", ids, zeros, zeros.astype(np.bool_))


def _engine(model: MoEModel, method: str) -> Engine:
    # The probe is small; its memory needs no bound.
    return Engine(model, memory=2**62, micro_batch=64, identity_every=1, method=method)


def _sweep_fails(model: MoEModel, probe: TokenSequence, layers: list[int]) -> str | None:
    reason = _basics_fail(model, probe, layers, "sweep")
    if reason is not None:
        return reason
    asked: dict[str, Any] = {"layers": layers, "interventions": [Intervention("zero")]}
    at = [_AUDITED[1:2]]
    found = [_engine(model, method).measure([probe], at, **asked).effects.to_pandas() for method in ("sweep", "oracle")]
    key = ["layer", "unit", "expert"]
    both = found[0].merge(found[1], on=key, suffixes=("", "_oracle"))
    tolerance = _TOLERANCES[model.dtype][2]
    apart = (both["kl"] - both["kl_oracle"]).abs() > tolerance * both["kl_oracle"].clip(lower=1.0)
    rows = len(found[0])
    differing = int(apart.sum()) + rows - len(both)  # those of experts that a whole forward does not route to, too
    # In low precision a row near a tie may be routed otherwise; that is what the noise floor reports.
    if differing > 0.2 * rows:
        return f"{differing} of {rows} probed effects differ from whole forwards, or are of other experts"
    return None


def _basics_fail(model: MoEModel, probe: TokenSequence, layers: list[int], method: str) -> str | None:
    """Loss, identity and a real intervention, by the given method."""
    loss_tolerance, identity_tolerance, _ = _TOLERANCES[model.dtype]
    at = np.arange(_PROBE_TOKENS) if method == "sweep" else _AUDITED
    measured = _engine(model, method).measure([probe], [at], layers=layers, interventions=[Intervention("zero")])
    effects = measured.effects.to_pandas()
    if method == "sweep":
        ours, own = float(measured.tokens.to_pandas()["baseline_loss"].mean()), _library_loss(model, probe)
        if not abs(ours - own) <= loss_tolerance * abs(own):
            return f"its loss on the probe is {ours:.6f} nats, the library's own {own:.6f}"
    control, real = effects[effects["unit"] == "identity"], effects[effects["unit"] == "expert"]
    if not control["kl"].max() <= identity_tolerance:
        return f"the identity intervention changes the prediction by up to {control['kl'].max():.1e} nats"
    if not real["kl"].max() > control["kl"].max():
        return "removing experts changes nothing"
    return None


@torch.inference_mode()
def _library_loss(model: MoEModel, probe: TokenSequence) -> float:
    ids = torch.from_numpy(probe.token_ids).to(model.device)[None]
    with model.own_attention():
        return float(model.module(input_ids=ids, labels=ids, use_cache=False).loss)


@torch.inference_mode()
def _reroute_fails(model: MoEModel, probe: TokenSequence) -> str | None:
    ids = torch.from_numpy(probe.token_ids).to(model.device)[None]
    for layer, site in model.sites.items():
        if site.router is None:
            return f"layer {layer} has no router module"
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with replaced({site.block: _noting(site.block, given)}), model.own_attention():
            model.module(input_ids=ids, use_cache=False)
        with model.shard.visit(layer):
            biases = correction_biases(site.block, site.num_experts)
        reason = verify(
            _chooser(model.shard, site, *given[0]),
            _PROBE_TOKENS,
            site.num_experts,
            biases,
            torch.Generator().manual_seed(2),
        )
        if reason is not None:
            return f"in layer {layer} {reason}"
    return None


def _noting(block: nn.Module, given: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[..., Any]:
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        return own(*args, **kwargs)

    return forward


def _chooser(
    shard: ModelShard, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor | None], tuple[Tensor, Tensor, Strike | None]]:
    """Route the block's probe rows once, without the experts marked in ``removed_NE``."""
    router = site.router
    assert router is not None
    own = router.forward

    def choose(removed_NE: Tensor | None) -> tuple[Tensor, Tensor, Strike | None]:
        chosen: list[tuple[Tensor, Tensor]] = []
        strike = None if removed_NE is None else Strike(removed_NE, correction_biases(site.block, site.num_experts))

        def experts(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            chosen.append((index, weights))
            return torch.zeros_like(x)

        def struck(*a: Any, **k: Any) -> Any:
            with strike or contextlib.nullcontext():
                return own(*a, **k)

        with shard.visit(site.layer), replaced({site.experts: experts, router: struck}):
            site.block(*args, **kwargs)
        return (*chosen[0], strike)

    return choose


__all__ = ["load", "validate"]
