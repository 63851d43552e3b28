"""Metrics of a loaded model that need no token: its routers' and experts' weights."""

from __future__ import annotations

import pandas as pd

from audit.models.moe_model import MoEModel
from audit.observations import weight_statistics


def weight_metrics(model: MoEModel) -> pd.DataFrame:
    """``weight_statistics`` of every MoE layer. Layers whose router holds no matrix with a row per expert are
    left out.
    """
    frames = []
    for layer, site in model.sites.items():
        matrices = [p for p in site.router.parameters() if p.dim() == 2] if site.router is not None else []
        router = next((p for p in matrices if p.shape[0] == site.num_experts), None)
        if router is None:
            continue
        stacked = [p for p in site.experts.parameters(recurse=False) if p.dim() == 3]
        experts = ([p[expert] for p in stacked] for expert in range(site.num_experts))
        frames.append(weight_statistics(layer, router, experts))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["layer", "expert"])
