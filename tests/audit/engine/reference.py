"""Interventions carried out another way: whole forwards of the library's model with edited routing tables.

Nothing here uses the engine. The experts are linear in their routing weights, so removing, scaling and re-normalising
edit the table that the experts module is given; only stored outputs (mean, resample) are added to what it returns. For
reroute every family's rule is written out below, with the struck experts' columns deleted. Many counterfactual worlds
run as one batch of whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax, logsumexp, xlogy
from torch import Tensor

from audit.corpus import TokenSequence
from audit.interventions import Intervention
from audit.models import MoEModel

Key = tuple[Any, ...]
KEY = ["sequence", "position", "layer", "unit", "expert", "experts", "intervention", "target", "parameter", "draw"]
Rankings = Mapping[str, Mapping[int, Sequence[float]]]  # metric: layer: a value per expert


# ---- what the routers would choose without some of their experts ----


def _top(scores: Tensor, k: int) -> Tensor:
    return torch.sort(scores, descending=True, stable=True).indices[:k]


def _softmax_then_top(logits: Tensor, k: int, normalised: bool, scaling: float = 1.0) -> Any:
    p = torch.softmax(logits, -1)
    chosen = _top(p, k)
    return chosen, (p[chosen] / p[chosen].sum() if normalised else p[chosen]) * scaling


def _top_then_softmax(logits: Tensor, k: int) -> Any:
    chosen = _top(logits, k)
    return chosen, torch.softmax(logits[chosen], -1)


def _sigmoid_with_bias(
    logits: Tensor, bias: Tensor, k: int, normalised: bool, scaling: float, allowed: Tensor | None = None
) -> Any:
    p = torch.sigmoid(logits)
    choice = p + bias
    chosen = _top(choice if allowed is None else torch.where(allowed, choice, float("-inf")), k)
    return chosen, (p[chosen] / p[chosen].sum() if normalised else p[chosen]) * scaling


def _in_the_best_groups(logits: Tensor, bias: Tensor, group: Tensor, groups: int, kept: int) -> Tensor:
    """Which experts stand in one of the best groups; a group is worth its two best biased scores."""
    choice = torch.sigmoid(logits) + bias
    worth = torch.stack([choice[group == g].sort(descending=True).values[:2].sum() for g in range(groups)])
    return torch.isin(group, _top(worth, kept))


def _sparsemixer(logits: Tensor, epsilon: float) -> Any:
    """Two choices one after another, each with the weight of a softmax over logits close to the best (2409.12136)."""
    chosen, weights, left = [], [], logits.clone()
    for _ in range(2):
        best = left.max()
        near = (best - logits) / torch.maximum(logits.abs(), best) <= 2 * epsilon
        near &= torch.isfinite(left)
        chosen.append(int(left.argmax()))
        weights.append(torch.softmax(left[near], -1).max())
        left[chosen[-1]] = float("-inf")
    return torch.tensor(chosen), torch.stack(weights)


def rechoose(model: MoEModel, layer: int, x_D: Tensor, without: set[int]) -> tuple[Tensor, Tensor]:
    """The experts and weights that the family's router picks for the row ``x_D`` when some experts do not exist."""
    site, config = model.sites[layer], model.module.config
    router: Any = site.router
    family, k = config.model_type, site.top_k
    matrix = next(p for p in router.parameters() if p.dim() == 2 and len(p) == site.num_experts and p.shape[1] > 1)
    left = torch.tensor([e for e in range(site.num_experts) if e not in without])
    logits = (matrix.double() @ x_D.double())[left]
    if family in ("olmoe", "qwen2_moe", "qwen3_moe", "flex_olmo"):
        chosen, weights = _softmax_then_top(logits, k, config.norm_topk_prob)
    elif family in ("mixtral", "hunyuan_v1_moe"):
        chosen, weights = _softmax_then_top(logits, k, True)
    elif family == "deepseek_v2":
        chosen, weights = _softmax_then_top(logits, k, False, config.routed_scaling_factor)
    elif family == "gpt_oss":
        chosen, weights = _top_then_softmax(logits + router.bias.double()[left], k)
    elif family in ("granitemoe", "granitemoeshared"):
        chosen, weights = _top_then_softmax(logits, k)
    elif family in ("deepseek_v3", "glm4_moe", "dots1", "solar_open", "exaone_moe"):
        bias = router.e_score_correction_bias.double()[left]
        group = left // (site.num_experts // config.n_group)
        allowed = _in_the_best_groups(logits, bias, group, config.n_group, config.topk_group)
        chosen, weights = _sigmoid_with_bias(
            logits, bias, k, config.norm_topk_prob, config.routed_scaling_factor, allowed
        )
    elif family == "minimax_m2":
        bias = dict(site.block.named_buffers())["e_score_correction_bias"].double()[left]
        chosen, weights = _sigmoid_with_bias(logits, bias, k, True, 1.0)
    elif family == "afmoe":
        bias = dict([*site.block.named_buffers(), *site.block.named_parameters()])["expert_bias"].double()[left]
        chosen, weights = _sigmoid_with_bias(logits, bias, k, True, config.route_scale)
    elif family == "ernie4_5_moe":
        p = torch.softmax(logits, -1)
        chosen = _top(p + router.moe_statics.e_score_correction_bias.double().flatten()[left], k)
        weights = p[chosen] / p[chosen].sum().clamp_min(config.moe_norm_min)
    elif family == "phimoe":
        chosen, weights = _sparsemixer(logits, config.router_jitter_noise)
    else:
        raise AssertionError(f"no rule written for {family}")
    return left[chosen], weights


# ---- clean forwards ----


@dataclass
class Clean:
    """What one sequence does without interventions, read off by hooks."""

    ids: Tensor
    logits_TV: Tensor
    x_TD: dict[int, Tensor] = field(default_factory=dict)
    index_TK: dict[int, Tensor] = field(default_factory=dict)
    weights_TK: dict[int, Tensor] = field(default_factory=dict)
    routed_TD: dict[int, Tensor] = field(default_factory=dict)


def clean_run(model: MoEModel, ids: Tensor) -> Clean:
    """One plain forward."""
    seen = Clean(ids, torch.empty(0))
    handles = []
    for layer, site in model.sites.items():

        def note(module: Any, args: Any, kwargs: Any, output: Tensor, layer: int = layer) -> None:
            x, index, weights = [*args, *kwargs.values()]
            seen.x_TD[layer], seen.index_TK[layer], seen.weights_TK[layer] = x.clone(), index, weights
            seen.routed_TD[layer] = output.clone()

        handles.append(site.experts.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.inference_mode(), model.own_attention():
            seen.logits_TV = model.module(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.inference_mode()
def expert_output(model: MoEModel, layer: int, x_D: Tensor, expert: int) -> Tensor:
    """The un-weighted output [D] of one expert for one row."""
    one = torch.ones(1, 1, dtype=x_D.dtype)
    return model.sites[layer].experts(x_D[None], torch.tensor([[expert]]), one)[0]


def mean_outputs(model: MoEModel, sequences: Sequence[TokenSequence], layer: int) -> dict[int, Tensor]:
    """Mean output of every expert over the tokens routed to it, float64; experts that got none are absent."""
    found: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        clean = clean_run(model, torch.from_numpy(sequence.token_ids))
        for t, experts in enumerate(clean.index_TK[layer].tolist()):
            for e in experts:
                found.setdefault(e, []).append(expert_output(model, layer, clean.x_TD[layer][t], e).double())
    return {e: torch.stack(rows).mean(0) for e, rows in found.items()}


# ---- which experts a set holds ----


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood 2014, in unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def random_order(experts: Sequence[int], seed: int, layer: int, sequence: int, position: int, draw: int) -> list[int]:
    """A token's active experts in the order in which a random target takes them."""

    def priority(expert: int) -> int:
        state = 0
        for word in (1, seed, layer, sequence * 2**32 + position, draw, expert):
            state = splitmix64(state ^ word)
        return state - 2**64 if state >= 2**63 else state  # hashes are compared as signed integers

    return sorted(experts, key=priority)


def ranked_order(experts: Sequence[int], values: Sequence[float]) -> list[int]:
    """A token's active experts by descending value, of equal ones the lower id first; none where a value is missing."""
    if any(np.isnan(values[e]) for e in experts):
        return []
    return sorted(experts, key=lambda e: (-values[e], e))


# ---- counterfactual worlds ----


@dataclass
class World:
    """One counterfactual run of a sequence: what is done to which experts at which positions, and where it is read."""

    layer: int
    intervention: Intervention
    acted: dict[int, list[int]]  # position: experts acted upon, in slot order
    read: dict[int, Key]  # position: the row of the effect table it is
    draw: int = 0
    sequence: int = 0


def worlds(
    model: MoEModel,
    clean: Clean,
    sequence: int,
    layer: int,
    intervention: Intervention,
    positions: Sequence[int],
    scope: str,
    all_positions: bool = False,
    calibrated: set[int] | None = None,
    seed: int = 0,
    rankings: Rankings | None = None,
) -> Iterator[World]:
    """Every world that the methods name for one intervention on one sequence, by plain loops."""
    target, T = intervention.target, len(clean.ids)
    index, weights = clean.index_TK[layer].tolist(), clean.weights_TK[layer].double()
    parameter = intervention.factor if intervention.kind == "scale" else target.count
    has_draws = intervention.kind == "resample" or target.selection == "random"
    name = f"ranked:{target.metric}" if target.selection == "ranked" else target.selection

    def row(t: int, unit: str, expert: int, experts: list[int], draw: int) -> Key:
        listed = tuple(experts) if unit == "set" else ()
        shown = -1.0 if parameter is None else round(float(parameter), 6)
        return (sequence, t, layer, unit, expert, listed, intervention.kind, name, shown, draw if has_draws else -1)

    def the_set(t: int, draw: int) -> list[int]:
        every = range(len(index[t]))  # in the router's own order, which also decides between equal weights
        order: list[int] = []  # of experts
        if target.selection == "random":
            order = random_order(index[t], seed, layer, sequence, t, draw)
        elif target.selection == "ranked":
            assert rankings is not None
            order = ranked_order(index[t], rankings[str(target.metric)][layer])
        slots = {
            "all": every,
            "lowest": sorted(every, key=lambda k: float(weights[t, k]))[: target.count],
            "highest": sorted(every, key=lambda k: -float(weights[t, k]))[: target.count],
            "listed": [k for k in every if index[t][k] in (target.experts or ())],
            "random": [index[t].index(e) for e in order[: target.count]],
            "ranked": [index[t].index(e) for e in order[: target.count]],
        }[target.selection]
        chosen = [index[t][k] for k in sorted(slots)]
        if calibrated is not None and not set(chosen) <= calibrated:
            return []
        nobody_left = target.selection == "listed" and intervention.kind == "renormalize"
        return [] if nobody_left and len(chosen) == len(index[t]) else chosen

    for draw in range(intervention.draws):
        if target.selection == "shared":
            if scope == "token":
                for t in positions:
                    yield World(layer, intervention, {t: []}, {t: row(t, "shared", -1, [], draw)}, draw, sequence)
            else:
                read = {t: row(t, "shared", -1, [], draw) for t in positions}
                yield World(layer, intervention, {t: [] for t in range(T)}, read, draw, sequence)
        elif target.selection == "each":
            allowed = [
                e
                for e in range(model.sites[layer].num_experts)
                if (target.experts is None or e in target.experts) and (calibrated is None or e in calibrated)
            ]
            if scope == "token":
                for t in positions:
                    for e in index[t]:
                        if e in allowed:
                            key = row(t, "expert", e, [], draw)
                            yield World(layer, intervention, {t: [e]}, {t: key}, draw, sequence)
                continue
            for e in allowed:
                acted = {t: [e] for t in range(T) if e in index[t]}
                read = {t: row(t, "expert", e, [], draw) for t in positions if t in acted or (all_positions and acted)}
                if read:
                    yield World(layer, intervention, acted, read, draw, sequence)
        elif scope == "token":
            for t in positions:
                chosen = the_set(t, draw)
                if chosen:
                    key = row(t, "set", -1, chosen, draw)
                    yield World(layer, intervention, {t: chosen}, {t: key}, draw, sequence)
        else:
            acted = {t: the_set(t, draw) for t in range(T) if the_set(t, draw)}
            read = {t: row(t, "set", -1, acted.get(t, []), draw) for t in positions if t in acted or all_positions}
            if read:
                yield World(layer, intervention, acted, read, draw, sequence)


Stored = Callable[[World, int, int], Tensor]  # (world, expert, position) -> the output [D] put in the expert's place


def edited_forwards(
    model: MoEModel, clean: Clean, batch: Sequence[World], stored: Stored | None
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of the worlds, all at one layer, and the change [B, T, D] of the MoE output under do(.)."""
    layer = batch[0].layer
    site, T = model.sites[layer], len(clean.ids)
    index = clean.index_TK[layer].repeat(len(batch), 1)
    weights = clean.weights_TK[layer].repeat(len(batch), 1)
    added = torch.zeros(len(batch) * T, clean.x_TD[layer].shape[1], dtype=torch.float64)
    shared_factor = torch.ones(len(batch) * T, 1, dtype=torch.float64)
    for b, world in enumerate(batch):
        kind = world.intervention.kind
        for t, experts in world.acted.items():
            row = b * T + t
            if world.intervention.target.selection == "shared":
                shared_factor[row] = 0.0 if kind == "zero" else world.intervention.factor
                continue
            slots = [clean.index_TK[layer][t].tolist().index(e) for e in experts]
            if kind == "reroute":
                chosen, new = rechoose(model, layer, clean.x_TD[layer][t], set(experts))
                index[row], weights[row] = chosen, new.to(weights.dtype)
                continue
            if kind == "scale":
                weights[row, slots] *= world.intervention.factor
                continue
            total = weights[row].sum()
            if kind in ("mean", "resample"):
                assert stored is not None
                for slot, expert in zip(slots, experts, strict=True):
                    added[row] += weights[row, slot].double() * stored(world, expert, t)
            weights[row, slots] = 0.0
            if kind == "renormalize":
                weights[row] *= total / weights[row].sum()
    changed: list[Tensor] = []

    def table(module: Any, args: Any, kwargs: Any) -> Any:
        x = next(iter([*args, *kwargs.values()]))
        return (x, index, weights), {}

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + added.to(output.dtype)

    def scale(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * shared_factor.view(*([len(batch), T] if output.dim() == 3 else [-1]), 1).to(output.dtype)

    def moved(module: Any, args: Any, output: Any) -> None:
        changed.append((output[0] if isinstance(output, tuple) else output).reshape(len(batch), T, -1))

    handles = [
        site.experts.register_forward_pre_hook(table, with_kwargs=True),
        site.experts.register_forward_hook(add),
    ]
    handles.append(site.block.register_forward_hook(moved))
    if site.shared is not None:
        handles.append(site.shared.register_forward_hook(scale))
        if not any(child is site.shared for child in site.block.modules()):
            handles.append(site.shared.register_forward_hook(moved))
    try:
        with torch.inference_mode(), model.own_attention():
            ids = clean.ids[None].repeat(len(batch), 1)
            logits = model.module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, sum(changed)


def plain_outcomes(z: np.ndarray, changed: np.ndarray, target: int) -> dict[str, float]:
    """Outcomes of one token by their definitions, float64; ``target`` is -1 at the end of a sequence."""
    z, changed = z.astype(np.float64), changed.astype(np.float64)
    log_p, log_q = log_softmax(z), log_softmax(changed)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = logsumexp(np.stack([log_p, log_q]), axis=0) - np.log(2)
    at = target if target >= 0 else 0
    none = np.nan if target < 0 else 0.0
    return {
        "kl": float((xlogy(p, p) - p * log_q).sum()),
        "js": float(0.5 * (p * (log_p - log_m)).sum() + 0.5 * (q * (log_q - log_m)).sum()),
        "tv": float(0.5 * np.abs(p - q).sum()),
        "top1_flip": float(np.argmax(z) != np.argmax(changed)),
        "delta_loss": float(log_p[at] - log_q[at]) + none,
        "delta_logit": float(changed[at] - z[at]) + none,
    }


def effects(
    model: MoEModel,
    sequences: Sequence[TokenSequence],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
    interventions: Sequence[Intervention],
    scope: str,
    all_positions: bool = False,
    means: dict[int, dict[int, Tensor]] | None = None,
    drawn: Callable[[int, int, int, int, int], Tensor] | None = None,
    seed: int = 0,
    rankings: Rankings | None = None,
) -> pd.DataFrame:
    """The effect table as the methods define it, one whole forward per world, indexed by :data:`KEY`.

    ``means[layer][expert]`` and ``drawn(sequence, layer, expert, position, draw)`` give what mean and resample insert;
    random targets go by the engine's ``seed``, ranked ones by ``rankings``.
    """

    def stored(world: World, expert: int, position: int) -> Tensor:
        if world.intervention.kind == "mean":
            assert means is not None
            return means[world.layer][expert]
        assert drawn is not None
        return drawn(world.sequence, world.layer, expert, position, world.draw).double()

    rows: list[dict[str, Any]] = []
    for sequence, at in zip(sequences, positions, strict=True):
        clean = clean_run(model, torch.from_numpy(sequence.token_ids))
        before_TV = clean.logits_TV.double().numpy()
        next_token = [*sequence.token_ids[1:].tolist(), -1]
        for layer in layers:
            batch = [World(layer, Intervention("scale", factor=1.0), {}, {})]
            for intervention in interventions:
                needs = intervention.kind in ("mean", "resample")
                calibrated = set((means or {})[layer]) if needs else None
                options = (scope, all_positions, calibrated, seed, rankings)
                batch += worlds(model, clean, sequence.index, layer, intervention, list(at), *options)
            logits, moved = edited_forwards(model, clean, batch, stored)
            gap = torch.linalg.vector_norm((moved - moved[0]).double(), dim=-1)
            for b, world in enumerate(batch):
                for t, key in world.read.items():
                    row = dict(zip(KEY, key, strict=True))
                    row |= plain_outcomes(before_TV[t], logits[b, t].double().numpy(), next_token[t])
                    row |= _acted_upon(model, clean, world, t)
                    rows.append(row | {"gap_norm": float(gap[b, t])})
    return pd.DataFrame(rows).set_index(KEY).sort_index()


def _acted_upon(model: MoEModel, clean: Clean, world: World, t: int) -> dict[str, float]:
    """Summed routing weight, and norm of the summed contributions, of the experts acted upon at position ``t``."""
    if world.intervention.target.selection == "shared":
        return {"routing_weight": np.nan, "contribution_norm": np.nan}
    total, weight = torch.zeros(clean.x_TD[world.layer].shape[1], dtype=torch.float64), 0.0
    for expert in world.acted.get(t, []):
        slot = clean.index_TK[world.layer][t].tolist().index(expert)
        g = float(clean.weights_TK[world.layer][t, slot])
        total += g * expert_output(model, world.layer, clean.x_TD[world.layer][t], expert).double()
        weight += g
    return {"routing_weight": weight, "contribution_norm": float(torch.linalg.vector_norm(total))}


def keyed(table: Any) -> pd.DataFrame:
    """An engine's effect table in the form of :func:`effects`, without its identity controls."""
    frame = table.to_pandas()
    frame = frame[frame["unit"] != "identity"].copy()
    for name in ("unit", "intervention", "target"):
        frame[name] = frame[name].astype(str)
    frame["expert"] = frame["expert"].fillna(-1).astype(int)
    frame["experts"] = [() if e is None else tuple(int(i) for i in e) for e in frame["experts"]]
    frame["parameter"] = [-1.0 if np.isnan(v) else round(float(v), 6) for v in frame["parameter"].astype(float)]
    frame["draw"] = frame["draw"].fillna(-1).astype(int)
    frame["top1_flip"] = frame["top1_flip"].astype(float)
    return frame.set_index(KEY).sort_index()
