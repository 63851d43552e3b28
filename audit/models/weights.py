"""Metrics of a loaded model that need no token: its routers' and experts' weights."""

from __future__ import annotations

import pandas as pd
from torch import Tensor

from audit.models.discovery import Site, whole_shape
from audit.models.moe_model import MoEModel
from audit.models.shards.expert_slices import expert_weights
from audit.observations import weight_statistics


def weight_metrics(model: MoEModel) -> pd.DataFrame:
    """``weight_statistics`` of every MoE layer; no rows where :func:`has_weight_metrics` says no."""
    frames = []
    if not has_weight_metrics(model):
        return pd.DataFrame(columns=["layer", "expert"])
    for layer, site in model.sites.items():
        with model.shard.visit(layer):
            router = _router_matrix(site)
            assert router is not None
            frames.append(weight_statistics(layer, router, expert_weights(site.experts, site.num_experts)))
    return pd.concat(frames, ignore_index=True)


def has_weight_metrics(model: MoEModel) -> bool:
    """Whether every MoE layer's router holds a matrix with a row per expert."""
    return all(_router_matrix(site) is not None for site in model.sites.values())


def _router_matrix(site: Site) -> Tensor | None:
    matrices = list(site.router.parameters()) if site.router is not None else []
    return next((p for p in matrices if len(shape := whole_shape(p)) == 2 and shape[0] == site.num_experts), None)
