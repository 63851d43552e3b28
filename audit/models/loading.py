"""Load a causal language model and find its MoE layers, or say in one sentence why it cannot be audited."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from audit.models import attention
from audit.models.description import description_of, text_config
from audit.models.discovery import ModelError, Site, decoder_layers, find_sites, promised_moe_layers, whole_shape
from audit.models.experts import Experts, ModuleExperts, SortedExperts, agrees, experts_of
from audit.models.head import Head
from audit.models.linear import LinearPath, OneDNNLinear, fastest_linear, onednn_agrees
from audit.models.moe_model import MoEModel
from audit.models.rows import Rows, clean_forward
from audit.models.seam import record_calls, replaced, tensors_in
from audit.models.shards.backends import load_onto
from audit.models.shards.errors import out_of_memory
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.sources import Reading, first_sentence


def load_model(
    source: str,
    *,
    files: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    experts: str = "auto",
    linear: str = "auto",
    shard: ModelShard | None = None,
    inspect: Inspect | None = None,
) -> MoEModel:
    """Load a checkpoint from a folder, the hub, or the embedded one (``source="demo"``).

    ``files``: the folder that the files of a ``source`` which is a URL were fetched to. ``shard``: how this process
    holds the model; None: whole. Where ranks divide it, they call this together. ``inspect`` is called with the model
    as it was read; on rank 0 alone, which reads it for all.

    Raises ModelError, one sentence, where the checkpoint cannot be read or is not a model that can be audited.
    """
    reading = Reading(
        source=source,
        files=files,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    place = reading.place
    if place.type == "cuda":  # some installations allow a GPU to round float32 products to ten bits
        torch.set_float32_matmul_precision("highest")
    if shard is not None and shard.backend != "single":
        module, tokenizer = load_onto(reading, shard, inspect)
        return prepare(module, tokenizer, source=source, experts=experts, linear=linear, shard=shard)
    module = reading.module()
    if inspect is not None:
        inspect(module, decoder_layers(module), ModelShard())
    return prepare(module.to(place), reading.tokenizer(), source=source, experts=experts, linear=linear)


def prepare(
    module: Any,
    tokenizer: Any = None,
    *,
    source: str = "in memory",
    experts: str = "auto",
    linear: str = "auto",
    shard: ModelShard | None = None,
) -> MoEModel:
    """Find the MoE layers of a model in memory and choose the fast paths. Raises ModelError.

    ``shard``: how this process holds the model's layers; None: whole.
    """
    shard = shard or ModelShard()
    module = module.eval().requires_grad_(False)
    config = text_config(module.config)
    layers = decoder_layers(module)
    _visit_when_called(layers, shard)
    sites = find_sites(layers)
    promised = promised_moe_layers(config, len(layers))
    notes = shard.notes()
    if getattr(module.config, "output_router_logits", False):
        module.config.output_router_logits = False
        notes.append("output_router_logits was switched off: the auxiliary loss it leads to is no part of the audit")
    if promised is None:
        notes.append("the configuration does not say which layers are MoE layers; those found are taken")
    elif promised != set(sites):
        raise ModelError(f"model: the configuration promises MoE layers {sorted(promised)}, found were {sorted(sites)}")

    engine, reason, dims, attention_modules = _try_sweep(module, layers)
    sites, ranges = _probe(module, sites)
    # What each rank times for itself may come out otherwise on each, and ranks must compute alike.
    linear_path = _linear_path("torch" if linear == "auto" and shard.ranks > 1 else linear, module)
    path: dict[int, Experts] = {}
    chosen = "module"
    with torch.inference_mode(), OneDNNLinear() if linear_path == "onednn" else contextlib.nullcontext():
        ok = experts != "module" and _all_agree(shard, sites, ranges)
        if experts == "sorted" and not ok:
            raise ModelError(
                "engine.experts: 'sorted' does not reproduce this model's experts module; use auto or module"
            )
        chosen = "sorted" if ok else "module"
        for layer, site in sites.items():
            with shard.visit(layer):
                path[layer] = experts_of(site.experts, SortedExperts if ok else ModuleExperts)
    description = description_of(
        module,
        config,
        len(layers),
        sites,
        source=source,
        top_k=max(s.top_k for s in sites.values()),
        size=sum(math.prod(whole_shape(p)) * p.element_size() for p in module.parameters()),
        engine=(engine, reason),
        notes=notes,
    )
    return MoEModel(
        module,
        tokenizer,
        layers,
        sites,
        path,
        chosen,
        linear_path,
        dims,
        attention_modules,
        Head(module, layers),
        description,
        shard,
    )


def _visit_when_called(layers: nn.ModuleList, shard: ModelShard) -> None:
    """Make every layer bring its own weights where nobody has done so; what replaces a layer brings none."""
    if shard.traits.resident:
        return
    for number, layer in enumerate(layers):
        layer.__dict__["forward"] = _visiting(number, layer.forward, shard)


def _visiting(number: int, own: Callable[..., Any], shard: ModelShard) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with shard.visit(number):
            return own(*args, **kwargs)

    return forward


def _all_agree(shard: ModelShard, sites: dict[int, Site], ranges: dict[int, tuple[Tensor, Tensor, Tensor]]) -> bool:
    found = True
    for layer, site in sites.items():  # ranks ask for every layer together, also after one has said no
        with shard.visit(layer):
            found = agrees(site.experts, *ranges[layer]) and found
    return found


def _linear_path(linear: str, module: nn.Module) -> LinearPath:
    parameter = next(module.parameters())
    if linear == "torch" or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return "torch"
    if linear == "auto":
        return fastest_linear()
    if not onednn_agrees():
        raise ModelError(
            "engine.linear: 'onednn' is not available or does not agree with torch here; use auto or torch"
        )
    return "onednn"


def _try_sweep(
    module: Any, layers: nn.ModuleList
) -> tuple[str, str, list[list[int | None]], list[tuple[nn.Module, ...]]]:
    """Whether the sweep's attention can take over; along which dimension each layer argument runs over
    positions; what attends.
    """
    try:
        module.set_attn_implementation(attention.NAME)
        lengths = (5, 7)
        recorded = [
            record_calls(module, layers, torch.arange(n, device=next(module.parameters()).device)[None])
            for n in lengths
        ]
        if any(len(calls) != len(layers) for calls in recorded):
            raise attention.UnsupportedAttention("the model does not call its decoder layers once each")
        for calls, length in zip(recorded, lengths, strict=True):
            for call in calls:
                attention.first_visible(call.mask, length)
        dims = [_position_dims(a, b, lengths) for a, b in zip(*recorded, strict=True)]
        attending = _compare_clean(module, layers, dims)
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise
        module.set_attn_implementation("eager")
        return "oracle", f"the sweep cannot take over this family ({first_sentence(error)})", [], []
    return "sweep", "every layer attends through transformers' attention interface", dims, attending


def _compare_clean(module: Any, layers: nn.ModuleList, dims: list[list[int | None]]) -> list[tuple[nn.Module, ...]]:
    """Raise where two sequences run side by side as rows do not give the logits of the library's own code;
    else what attends.
    """
    parameter = next(module.parameters())
    vocabulary = int(text_config(module.config).vocab_size)
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randint(0, vocabulary, (n,), generator=generator).to(parameter.device) for n in (19, 8)]
    with torch.inference_mode():
        rows = Rows(module, layers, dims, probes)
        hidden, attending = clean_forward(rows)
        ours = Head(module, layers).logits(hidden)
        module.set_attn_implementation("eager")
        own = torch.cat([module(input_ids=p[None], use_cache=False).logits[0] for p in probes])
    module.set_attn_implementation(attention.NAME)
    # A row near a routing tie may be routed otherwise in another batch shape; what is asked of is the bulk of the rows.
    exact = parameter.dtype in (torch.float32, torch.float64)
    distance_T = (ours.double() - own.double()).abs().amax(1) / own.double().abs().max().clamp_min(1e-30)
    distance = float(distance_T.quantile(0.9 if exact else 0.5))
    if not distance <= (1e-3 if exact else 0.2):
        raise attention.UnsupportedAttention(f"rows side by side give logits {distance:.1e} apart from the model's own")
    return attending


def _position_dims(short: Any, long: Any, lengths: tuple[int, int]) -> list[int | None]:
    dims: list[int | None] = []
    for a, b in zip(tensors_in([short.args, short.kwargs]), tensors_in([long.args, long.kwargs]), strict=True):
        differing = [d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(differing) > 1 or (differing and (a.shape[differing[0]], b.shape[differing[0]]) != lengths):
            raise attention.UnsupportedAttention(
                f"a layer is given a tensor of shape {tuple(a.shape)} for {lengths[0]} positions"
            )
        dims.append(differing[0] if differing else None)
    return dims


def _probe(module: Any, sites: dict[int, Site]) -> tuple[dict[int, Site], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """One forward by the library's own code: what each experts module is given, hence each layer's top k."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(layer: int, site: Site) -> Any:
        original = site.experts.forward
        names = list(inspect.signature(type(site.experts).forward).parameters)[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *(kwargs[n] for n in names[len(args) :])]
            seen[layer] = (given[0].clone(), given[1].clone(), given[2].clone())
            return original(*args, **kwargs)

        return forward

    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    limit = int(getattr(text_config(module.config), "vocab_size", 2))
    ids = torch.randint(0, limit, (1, 24), generator=torch.Generator().manual_seed(0)).to(
        next(module.parameters()).device
    )
    with torch.inference_mode(), replaced({site.experts: watch(layer, site) for layer, site in sites.items()}):
        module(input_ids=ids, use_cache=False)
    module.set_attn_implementation(before)
    missing = sorted(set(sites) - set(seen))
    if missing:
        raise ModelError(
            f"model: the experts modules of layers {missing} are never called; the model computes its experts elsewhere"
        )
    probed: dict[int, Site] = {}
    for layer, (x, index, weights) in seen.items():
        if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or index.is_floating_point():
            raise ModelError(
                f"model: layer {layer} calls its experts with shapes {tuple(x.shape)}, {tuple(index.shape)}, "
                f"{tuple(weights.shape)}; rows, ids [N, K] and weights [N, K] are needed"
            )
        s = sites[layer]
        probed[layer] = Site(layer, s.experts, s.router, s.shared, s.block, s.num_experts, int(index.shape[1]))
    return dict(sorted(probed.items())), seen
