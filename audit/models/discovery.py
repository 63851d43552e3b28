"""Find the Mixture-of-Experts layers of a transformers model: experts, router, shared experts, decoder layers.

The seam is the fused experts module, ``experts(hidden, top_k_index, top_k_weights)``: one interface for all families of
transformers 5 that the audit supports. Nothing is looked up by family name; what is not understood is refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class ModelError(ValueError):
    """A model that cannot be audited, with the reason in one sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One MoE layer: where its experts, router and shared experts sit."""

    layer: int  # index among the decoder layers
    experts: nn.Module
    router: nn.Module | None  # None: the block routes without a module of its own
    shared: nn.Module | None
    block: nn.Module  # parent of the experts module
    num_experts: int
    top_k: int = 0  # learnt from the first forward; 0 until then


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` is a fused experts module: three inputs, and weights stacked over experts."""
    stacked = [p for p in module.parameters(recurse=False) if whole_shape(p)[:1] and len(whole_shape(p)) == 3]
    if not stacked or len({whole_shape(p)[0] for p in stacked}) != 1:
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)
    return len(parameters) == 4  # self, hidden, index, weights


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the one whose members hold experts modules."""
    found: list[nn.ModuleList] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(
            is_experts(child) for layer in module for child in layer.modules()
        ):
            found.append(module)
    outermost = [m for m in found if not any(m is not other and _contains(other, m) for other in found)]
    if not outermost:
        raise ModelError(
            f"model: {type(model).__name__} has no fused experts module (experts(hidden, top_k_index, "
            "top_k_weights)); only such models can be audited"
        )
    if len(outermost) > 1:
        raise ModelError(
            f"model: {type(model).__name__} has {len(outermost)} separate stacks of MoE layers; one decoder "
            "stack is needed"
        )
    return outermost[0]


def find_sites(layers: nn.ModuleList) -> dict[int, Site]:
    """The MoE layers by index. Raises ModelError where a layer holds more than one experts module."""
    sites: dict[int, Site] = {}
    for number, layer in enumerate(layers):
        experts = [(name, child) for name, child in layer.named_modules() if is_experts(child)]
        if not experts:
            continue
        if len(experts) > 1:
            raise ModelError(f"model: layer {number} has {len(experts)} experts modules; one is supported")
        name, module = experts[0]
        block = layer.get_submodule(name.rpartition(".")[0])
        stacked = next(p for p in module.parameters(recurse=False) if len(whole_shape(p)) == 3)
        num_experts = int(getattr(module, "num_experts", whole_shape(stacked)[0]))
        sites[number] = Site(number, module, _router(block, num_experts), _shared(block, layer), block, num_experts)
    return sites


def promised_moe_layers(config: Any, layers: int) -> set[int] | None:
    """The layers that the configuration says are MoE layers; None where it does not say."""
    types = getattr(config, "mlp_layer_types", None)
    if types:
        return {i for i, kind in enumerate(types) if kind in ("sparse", "moe")}
    start = getattr(config, "first_k_dense_replace", getattr(config, "num_dense_layers", None))
    if isinstance(start, int):
        frequency = getattr(config, "moe_layer_freq", 1)
        return {i for i in range(start, layers) if not isinstance(frequency, int) or i % frequency == 0}
    if isinstance(getattr(config, "decoder_sparse_step", None), int):
        dense = set(getattr(config, "mlp_only_layers", None) or ())
        return {i for i in range(layers) if i not in dense and (i + 1) % config.decoder_sparse_step == 0}
    if isinstance(getattr(config, "moe_layer_start_index", None), int):
        end, interval = getattr(config, "moe_layer_end_index", -1), getattr(config, "moe_layer_interval", 1)
        end = layers - 1 if end in (None, -1) else end
        return {i for i in range(config.moe_layer_start_index, end + 1) if (i + 1) % interval == 0}
    return None


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also while its values are elsewhere."""
    # DeepSpeed leaves a parameter empty while it is divided, with its true shape beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in outer.modules())


def _router(block: nn.Module, num_experts: int) -> nn.Module | None:
    """The child of the block that scores the experts: it holds a matrix with one row per expert."""
    for child in block.children():
        if is_experts(child):
            continue
        if any(
            len(whole_shape(p)) == 2 and whole_shape(p)[0] == num_experts for p in child.parameters()
        ) and not _looks_like_mlp(child):
            return child
    return None


def _shared(block: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The shared experts: by the names transformers uses, in the block or (Granite) on the decoder layer."""
    for parent in (block, layer):
        for name in ("shared_experts", "shared_expert", "shared_mlp"):
            child = getattr(parent, name, None)
            if isinstance(child, nn.Module):
                return child
    return None


def _looks_like_mlp(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("down_proj", "output_linear", "w2"))
