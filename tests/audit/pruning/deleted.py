"""Pruning carried out another way: experts are deleted from the modules in memory, and the library runs the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from families import Float64Throughout
from torch import Tensor, nn
from torch.nn import functional as F

from audit.models.discovery import decoder_layers, find_sites


def without(module: Any, removed: Mapping[int, Sequence[int]]) -> Any:
    """``module``, changed in place: what holds a row per expert (first dimension, or the second of one row) loses those
    of the experts removed.
    """
    for layer, site in find_sites(decoder_layers(module)).items():
        left = torch.tensor([e for e in range(site.num_experts) if e not in set(removed.get(layer, ()))])
        for part in site.block.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    for dim in range(min(2, tensor.dim())):
                        if tensor.shape[dim] == site.num_experts and (dim == 0 or tensor.shape[0] == 1):
                            kept = tensor.detach().index_select(dim, left)
                            table[name] = nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept
            if getattr(part, "num_experts", None) == site.num_experts:
                part.num_experts = len(left)
    return module


@torch.inference_mode()
def log_probabilities(module: Any, ids: Tensor) -> Tensor:
    """[T, V] by the library's own code."""
    with Float64Throughout():
        return torch.log_softmax(module(input_ids=ids[None], use_cache=False).logits[0].double(), -1)


def loss_and_kl(clean_TV: Tensor, pruned_TV: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The pruned model's cross-entropy and KL(clean || pruned) at every position with a next token [T - 1], nats."""
    kl = F.kl_div(pruned_TV, clean_TV, reduction="none", log_target=True).sum(-1)
    return F.nll_loss(pruned_TV[:-1], ids[1:], reduction="none"), kl[:-1]
