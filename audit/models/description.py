"""What a checkpoint holds, for people and plans: layers, experts, router, shared experts, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from audit.models.discovery import ModelError, Site, whole_shape


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What was found in a checkpoint; everything a person or a plan needs to know without the weights."""

    source: str
    family: str
    parameters: int
    bytes: int
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    router_rule: str
    shared_experts: bool
    hidden_size: int
    vocabulary: int
    context_limit: int | None
    engine: str  # "sweep" or "oracle"
    engine_reason: str
    notes: list[str] = field(default_factory=list)


def description_of(
    module: nn.Module,
    config: Any,
    layers: int,
    sites: Mapping[int, Site],
    *,
    source: str,
    top_k: int,
    size: int,
    engine: tuple[str, str],
    notes: Sequence[str],
) -> ModelDescription:
    """The description of a model whose MoE layers were found; ``engine`` is the method and the reason for it."""
    first = next(iter(sites.values()))
    return ModelDescription(
        source=source,
        family=config.model_type,
        parameters=sum(math.prod(whole_shape(p)) for p in module.parameters()),
        bytes=size,
        layers=layers,
        moe_layers=tuple(sites),
        experts=max(s.num_experts for s in sites.values()),
        top_k=top_k,
        router_rule=router_rule(first, config),
        shared_experts=any(s.shared is not None for s in sites.values()),
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        context_limit=getattr(config, "max_position_embeddings", None),
        engine=engine[0],
        engine_reason=engine[1],
        notes=list(notes),
    )


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def configured_top_k(config: Any) -> int:
    """Experts per token as the configuration names it."""
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            return int(max(value))
        if isinstance(value, int):
            return value
    raise ModelError(f"model: the configuration of {config.model_type} does not name its experts per token")


def router_rule(site: Site, config: Any) -> str:
    """One phrase on how experts are chosen, read off the configuration; for people, nothing computes from it."""
    kind = type(site.router).__name__ if site.router is not None else "inside the block"
    facts = [
        f"{name}={getattr(config, name)}"
        for name in ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor")
        if getattr(config, name, None) is not None
    ]
    return f"{kind} ({', '.join(facts)})" if facts else kind
