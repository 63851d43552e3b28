"""A loaded model as the engine uses it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from audit.models.description import ModelDescription
from audit.models.discovery import Site
from audit.models.experts import Experts
from audit.models.head import Head
from audit.models.linear import LinearPath, OneDNNLinear
from audit.models.shards.shard import ModelShard


@dataclass(slots=True, eq=False)
class MoEModel:
    """A loaded model with its MoE layers found and its fast paths chosen."""

    module: nn.Module
    tokenizer: Any
    layers: nn.ModuleList
    sites: dict[int, Site]
    experts: dict[int, Experts]
    experts_path: str  # "module" or "sorted"
    linear_path: LinearPath
    position_dims: list[
        list[int | None]
    ]  # per layer, per tensor it is called with: the dimension that runs over positions
    attention_modules: list[tuple[nn.Module, ...]]  # per layer
    head: Head
    description: ModelDescription
    shard: ModelShard
    # Why reroute is refused; None once validation has seen that it works.
    reroute_refused: str | None = "the model was not validated (audit.load and audit.validate do that)"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @contextlib.contextmanager
    def kernels(self) -> Any:
        """Within the block the chosen matrix kernels are in use and no gradients are kept."""
        with torch.inference_mode(), OneDNNLinear() if self.linear_path == "onednn" else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def own_attention(self) -> Any:
        """Within the block the model computes attention by its library's eager code, independent of the sweep."""
        config: Any = self.module.config
        before = config._attn_implementation
        self.module.set_attn_implementation("eager")  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.set_attn_implementation(before)  # type: ignore[operator]
