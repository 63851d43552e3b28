"""Write a checkpoint without the removed experts: smaller on disk, and plain transformers loads it.

Which tensors run over experts, and along which dimension, is learnt from the library itself: a model of the smaller
configuration, without weights, differs in shape exactly there. Nothing is looked up by family name.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from audit.models.description import configured_top_k, text_config
from audit.models.discovery import ModelError, decoder_layers, find_sites
from audit.models.sources import DTYPES, load_module, load_tokenizer, resolve_source
from audit.pruning.limits import RouterLimits, limits_of
from audit.pruning.plan import RemovalOrders

# What configurations call the number of routed experts; one that has several means the same by them.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCheckpoint:
    """What was written: experts kept per layer by their old numbers, bytes of the weights before and after."""

    folder: Path
    kept: Mapping[int, tuple[int, ...]]
    bytes_before: int
    bytes_after: int
    config_changes: Mapping[str, tuple[int, int]]  # field: before, after
    notes: tuple[str, ...] = ()


def prune_by_metric(
    source: str,
    metric_table: pd.DataFrame,
    metric: str,
    *,
    keep: int,
    out: Path,
    files: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> PrunedCheckpoint:
    """Keep the ``keep`` experts of every MoE layer that ``metric`` calls most important; write them to ``out``.

    ``metric_table`` as in ``results/metrics.parquet``, over every MoE layer; order and ties as in ``RemovalOrders``. A
    router with expert groups keeps the same number of the best of each group, because its groups are of one size.
    ``files``: the folder that the files of a ``source`` which is a URL were fetched to.
    Raises ValueError, one sentence, as :func:`write_pruned` does and where the metric lacks values.
    """
    _check_out(out)
    model = _load(source, files, revision, dtype)
    limits = _limits(model)
    orders = RemovalOrders(metric_table, limits, seed)
    kept = {}
    for layer, limit in limits.items():
        _check_keep(keep, limit)
        best_first = orders.order(layer, metric, "metric")[::-1].tolist()
        chosen = [
            [expert for expert in best_first if expert // limit.group_size == group][: keep // limit.groups]
            for group in range(limit.groups)
        ]
        kept[layer] = tuple(sorted(expert for group_chosen in chosen for expert in group_chosen))
    criterion = f"the experts kept are the {keep} of each layer that the metric `{metric}` ranks highest"
    if any(limit.groups > 1 for limit in limits.values()):
        criterion += ", the same number of each expert group"
    return _write(model, source, files, revision, kept, out, criterion)


def write_pruned(
    source: str,
    removed: Mapping[int, Sequence[int]],
    *,
    out: Path,
    revision: str | None = None,
    dtype: str | None = None,
    criterion: str = "the experts removed were given by number",
) -> PrunedCheckpoint:
    """Write the checkpoint ``source`` (a folder, a hub name, ``demo``) without the experts ``removed`` to ``out``.

    ``dtype``: None keeps the checkpoint's own. Shared experts, tokenizer and generation settings stay. ``out`` holds
    either nothing or the whole checkpoint: it is written beside it, read back, compared and moved there.
    Raises ValueError, one sentence: ``out`` is not empty; layers would keep different numbers of experts (a
    configuration has one), fewer than a token is routed to, or uneven groups; the checkpoint is quantized.
    """
    _check_out(out)
    model = _load(source, None, revision, dtype)
    kept: dict[int, tuple[int, ...]] = {}
    limits = _limits(model)
    if unknown := sorted(set(removed) - set(limits)):
        raise ValueError(f"removed: layers {unknown} have no routed experts; those that have are {sorted(limits)}")
    for layer, limit in limits.items():
        without = set(removed.get(layer, ()))
        if beyond := sorted(without - set(range(limit.experts))):
            raise ValueError(f"removed: layer {layer} has no experts {beyond}; it has 0 to {limit.experts - 1}")
        kept[layer] = tuple(expert for expert in range(limit.experts) if expert not in without)
    counts = {len(experts) for experts in kept.values()}
    if len(counts) > 1:
        raise ValueError(
            f"removed: layers would keep {min(counts)} to {max(counts)} experts; a configuration names one number, "
            "remove equally many in every MoE layer"
        )
    for layer, limit in limits.items():
        _check_keep(counts.copy().pop(), limit)
        per_group = [
            sum(expert // limit.group_size == group for expert in kept[layer]) for group in range(limit.groups)
        ]
        if len(set(per_group)) > 1:
            raise ValueError(
                f"removed: the expert groups of layer {layer} would keep {per_group} experts; groups are of one size, "
                "remove equally many from each"
            )
    return _write(model, source, None, revision, kept, out, criterion)


def _load(source: str, files: str | None, revision: str | None, dtype: str | None) -> Any:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"model.dtype: {dtype!r} is unknown; known are {', '.join(DTYPES)}")
    model = load_module(
        source, files=files, revision=revision, dtype="auto" if dtype is None else DTYPES[dtype], use_safetensors=True
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"model.source: {source!r} is quantized; only checkpoints of plain numbers can be pruned")
    return model


def _limits(model: Any) -> dict[int, RouterLimits]:
    config = text_config(model.config)
    sites = find_sites(decoder_layers(model))
    return {layer: limits_of(config, site.num_experts, configured_top_k(config)) for layer, site in sites.items()}


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {str(out)!r} is not empty; name a folder that is empty or does not exist")


def _check_keep(keep: int, limit: RouterLimits) -> None:
    least = limit.groups * limit.least_per_group
    if not least <= keep < limit.experts:
        groups = f" ({limit.least_per_group} in each of {limit.groups} groups)" if limit.groups > 1 else ""
        raise ValueError(
            f"keep: {keep} of {limit.experts} experts is not possible, a token is routed to {limit.top_k}{groups}; "
            f"choose {least} to {limit.experts - 1}"
        )
    if keep % limit.groups:
        raise ValueError(
            f"keep: {keep} experts cannot form {limit.groups} groups of one size; choose a multiple of {limit.groups}"
        )


def _write(
    model: Any,
    source: str,
    files: str | None,
    revision: str | None,
    kept: Mapping[int, tuple[int, ...]],
    out: Path,
    criterion: str,
) -> PrunedCheckpoint:
    tokenizer = load_tokenizer(resolve_source(source, files), revision=revision)
    bytes_before = _bytes(model)
    changes = _slice(model, kept)
    notes = () if tokenizer is not None else ("the source has no tokenizer that could be read; none was written",)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        folder = Path(beside) / "checkpoint"
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _compare(folder, model)
        report = PrunedCheckpoint(
            folder=out,
            kept=dict(kept),
            bytes_before=bytes_before,
            bytes_after=_bytes(model),
            config_changes=changes,
            notes=notes,
        )
        (folder / "README.md").write_text(_readme(report, source, revision, criterion), encoding="utf-8")
        folder.rename(out)
    return report


def _bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}  # tied weights are one
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _slice(model: Any, kept: Mapping[int, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Keep only the given experts in every tensor of ``model`` that runs over experts, and count them in its
    configuration; return the fields changed.

    The modules' own ideas of how many experts they have go stale: the model is there to be written.
    """
    keep = len(next(iter(kept.values())))
    # One number is what a configuration holds; layers that have another are refused below.
    experts = max(limit.experts for limit in _limits(model).values())
    smaller, changes = _smaller_config(model.config, experts, keep)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(smaller).state_dict().items()}
    layers = decoder_layers(model)
    (path,) = (name for name, module in model.named_modules() if module is layers)
    state = model.state_dict()
    owner = {f"{path}.{layer}.{name}": layer for layer in kept for name in layers[layer].state_dict()}
    assert shapes.keys() == state.keys(), shapes.keys() ^ state.keys()
    sliced = set[int]()
    for key, before in state.items():
        differing = [d for d, (a, b) in enumerate(zip(before.shape, shapes[key], strict=True)) if a != b]
        if not differing:
            continue
        if len(differing) != 1 or key not in owner or shapes[key][differing[0]] != keep:
            raise ModelError(f"model: {key} {tuple(before.shape)} would become {tuple(shapes[key])}; it cannot be cut")
        sliced.add(owner[key])
        _put(model, key, before.index_select(differing[0], torch.tensor(kept[owner[key]], device=before.device)))
    if sliced != set(kept):
        raise ModelError(f"model: its configuration does not decide the experts of layers {sorted(set(kept) - sliced)}")
    model.config = smaller
    return changes


def _smaller_config(config: Any, experts: int, keep: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    smaller = copy.deepcopy(config)
    text = text_config(smaller)
    written = text.to_dict()
    names = [name for name in _COUNTS if name in written and written[name] == experts]
    if not names:
        raise ModelError(
            f"model: the configuration of {text.model_type} names its {experts} experts in none of {', '.join(_COUNTS)}"
        )
    for name in names:
        setattr(text, name, keep)
    return smaller, dict.fromkeys(names, (experts, keep))


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, name, tensor)


def _compare(folder: Path, model: Any) -> None:
    """Read the checkpoint back and refuse it unless every tensor is, bit for bit, what was to be written."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected, found = model.state_dict(), again.state_dict()
    if type(again) is not type(model) or expected.keys() != found.keys():
        raise ModelError(f"model: {type(model).__name__} does not come back from disk as it was written")
    for key, tensor in expected.items():
        if tensor.dtype != found[key].dtype or not torch.equal(tensor, found[key]):
            raise ModelError(f"model: {key} does not come back from disk as it was written")


def _readme(report: PrunedCheckpoint, source: str, revision: str | None, criterion: str) -> str:
    before, keep = next(iter(report.config_changes.values()))
    of = source if revision is None else f"{source} at revision {revision}"
    lines = [
        f"# Pruned from {of}",
        "",
        f"Every Mixture-of-Experts layer keeps {keep} of {before} routed experts: {criterion}. Router rows, biases and "
        "the experts' weights were removed; nothing else was changed and nothing was trained afterwards. Written by "
        "moe-audit.",
        "",
        f"Weights: {report.bytes_before:,} bytes before, {report.bytes_after:,} after "
        f"({1 - report.bytes_after / report.bytes_before:.1%} less).",
        *(f"\n{note[0].upper()}{note[1:]}." for note in report.notes),
        "",
        "| field of the configuration | before | after |",
        "|---|---|---|",
        *(f"| `{name}` | {old} | {new} |" for name, (old, new) in report.config_changes.items()),
        "",
        "| layer | experts kept, by their numbers in the source |",
        "|---|---|",
        *(f"| {layer} | {', '.join(map(str, kept))} |" for layer, kept in report.kept.items()),
    ]
    return "\n".join(lines) + "\n"
