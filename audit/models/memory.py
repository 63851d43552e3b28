"""What the weights of a model take on every rank of each back end, and how much of a sweep fits beside them.

All from shapes: the model may be loaded, or built from its configuration alone (``audit.models.outline``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from audit.models.discovery import Site, whole_shape

Backend = Literal["single", "accelerate", "deepspeed_zero3", "deepspeed_tp", "transformers_tp"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Where a rank keeps the layers that it does not compute with: on its device, in its host's memory, on a local disk.
Offload = Literal["none", "cpu", "nvme"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Bytes of one decoder layer. ``other``: router, norms, and the MLP of a layer that has no experts."""

    attention: int
    experts: int
    shared: int
    other: int

    @property
    def total(self) -> int:
        return self.attention + self.experts + self.shared + self.other


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model by part. ``head``: 0 where it is the embedding; ``other``: norms and what else lies outside."""

    embedding: int
    head: int
    other: int
    layers: tuple[LayerWeights, ...]
    experts: int  # how many a layer has; the fewest where layers differ

    @property
    def outside(self) -> int:
        """Bytes outside the decoder layers, which every rank holds whole."""
        return self.embedding + self.head + self.other

    @property
    def inside(self) -> int:
        """Bytes of all decoder layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def total(self) -> int:
        return self.outside + self.inside

    @property
    def largest_layer(self) -> int:
        return max(layer.total for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of weights that one rank holds: on its device while a layer is visited, in host memory, on disk."""

    device: int
    host: int = 0
    disk: int = 0

    def beside_rows(self, device: str) -> int:
        """Bytes in the memory that a sweep's rows are in: on ``cpu`` that is the host's."""
        return self.device + (self.host if device == "cpu" else 0)


def weights_of(module: nn.Module, layers: nn.ModuleList, sites: Mapping[int, Site]) -> Weights:
    """Bytes by part, from the parameters' shapes and types."""
    embedding = _bytes(module.get_input_embeddings().parameters())  # type: ignore[operator]
    everything = _bytes(module.parameters())  # what is tied counts once
    inside = _bytes(layers.parameters())
    found = module.get_output_embeddings()  # type: ignore[operator]
    tied = {id(p) for p in module.get_input_embeddings().parameters()}  # type: ignore[operator]
    head = 0 if found is None else _bytes(p for p in found.parameters() if id(p) not in tied)
    return Weights(
        embedding=embedding,
        head=head,
        other=everything - inside - embedding - head,
        layers=tuple(_layer(layer, sites.get(number)) for number, layer in enumerate(layers)),
        experts=min(site.num_experts for site in sites.values()),
    )


def share_of(weights: Weights, backend: Backend, ranks: int = 1, offload: Offload = "none") -> Share:
    """What one of ``ranks`` holds; most, where ranks differ. ``offload``: with deepspeed_zero3 and accelerate.

    Under deepspeed_tp experts are divided, by whole experts; transformers_tp divides each. How far attention and dense
    and shared MLPs can be is known only when the layers are there, so they are counted whole: a bound.
    """
    match backend:
        case "single":
            return Share(weights.total)
        case "accelerate":
            device, experts = weights.outside + weights.largest_layer, sum(layer.experts for layer in weights.layers)
            if offload == "nvme":
                return Share(device, host=weights.inside - experts, disk=experts)
            return Share(device, host=weights.inside)
        case "deepspeed_zero3":
            part, visited = -(-weights.inside // ranks), weights.outside + weights.largest_layer
            match offload:
                case "none":
                    return Share(visited + part)
                case "cpu":
                    return Share(visited, host=part)
                case "nvme":
                    return Share(visited, disk=part)
        case "deepspeed_tp" | "transformers_tp":
            most = -(-weights.experts // ranks)
            return Share(
                weights.outside
                + sum(layer.total - layer.experts + layer.experts * most // weights.experts for layer in weights.layers)
            )


def _layer(layer: nn.Module, site: Site | None) -> LayerWeights:
    attention = _bytes(
        parameter
        for name, child in layer.named_children()
        if ("attn" in name or "attention" in name) and "norm" not in name  # a norm beside it is called after it
        for parameter in child.parameters()
    )
    experts = 0 if site is None else _bytes(site.experts.parameters())
    shared = 0 if site is None or site.shared is None else _bytes(site.shared.parameters())
    return LayerWeights(attention, experts, shared, _bytes(layer.parameters()) - attention - experts - shared)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(whole_shape(p)) * p.element_size() for p in parameters)
