"""The observational metrics: one definition each, computed from the sums of ``Observations``.

For one expert: X the tokens routed to it, N = |X|, T all tokens, g the routing weight, E the un-weighted output.
Spreads are over X, with ddof 1. A mean over no token, or a spread over fewer than two, is NaN; sums and
``utilization`` are then 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from audit.observations.accumulate import Observations
from audit.observations.histogram import gini
from audit.observations.sums import LayerSums

Label = Literal["published", "extended"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's definition. ``orientation``: 1 high means important, -1 low does, 0 claims neither.

    ``formula`` maps the sums of a layer [E, M] to values [E, M]; None: the value comes from the weights.
    ``error_bound``, where the value is approximated, maps them to the largest possible |error|.
    """

    name: str
    meaning: str
    orientation: Literal[-1, 0, 1]
    label: Label
    source: str
    formula: Callable[[LayerSums], Tensor] | None
    aliases: tuple[str, ...] = ()
    error_bound: Callable[[LayerSums], Tensor] | None = None


def _unified(sums: LayerSums, b: float, alpha: int, beta: int) -> Tensor:
    return sums.count_EM.double() ** -b * sums.power(alpha, beta)


def _variance(m2: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 1, m2 / (count - 1).clamp(min=1), torch.nan)


def _mean_weight(sums: LayerSums) -> Tensor:
    return _unified(sums, 1, 1, 0)


def _largest(sums: LayerSums) -> Tensor:
    return torch.where(sums.count_EM > 0, sums.max_EM, torch.nan)


def _fusion(sums: LayerSums) -> Tensor:
    return _variance(sums.m2_EMD.sum(-1), sums.count_EM).sqrt() * _mean_weight(sums)


def _entropy(sums: LayerSums) -> Tensor:
    total = sums.power(1, 0)
    return total.log() - sums.column("sum_g_ln_g") / total


def _gini(sums: LayerSums) -> tuple[Tensor, Tensor]:
    return gini(sums.histogram_EMB, sums.power(1, 0))


_DEFINITIONS = (
    Metric(
        "utilization", "N / T", 1, "published", "2606.10703",
        lambda s: s.count_EM.double() / s.tokens_M, aliases=("frequency",),
    ),
    Metric("mean_routing_weight", "mean of g", 1, "published", "2606.10703", _mean_weight),
    Metric(
        "activation_norm", "mean of ||E||", 1, "published", "2606.10703, 2606.15716",
        lambda s: _unified(s, 1, 0, 1), aliases=("man",),
    ),
    Metric(
        "activation_std", "standard deviation of ||E||", 1, "published", "2606.10703",
        lambda s: _variance(s.scalar_m2_EM2[..., 1], s.count_EM).sqrt(),
    ),
    Metric("gate_sum", "sum of g", 1, "extended", "SEER", lambda s: _unified(s, 0, 1, 0), aliases=("seer",)),
    Metric("ean", "sum of ||E||", 1, "extended", "EAN", lambda s: _unified(s, 0, 0, 1)),
    Metric("reap", "mean of g ||E||", 1, "extended", "2510.13999", lambda s: _unified(s, 1, 1, 1)),
    Metric("msan", "mean of ||E||^2", 1, "extended", "2606.15716", lambda s: _unified(s, 1, 0, 2)),
    Metric(
        "easy_ep", "sum of g ||E|| max(0, 1 - cos(hidden before, hidden after the routed experts))", 1, "extended",
        "2504.06792", lambda s: s.column("sum_easy_ep"),
    ),
    Metric("mone_fusion", "||sqrt(Var E)||_2 times mean of g", 1, "extended", "2507.00390", _fusion),
    Metric(
        "activation_max", "largest absolute entry of E", 1, "extended", "2507.23279",
        _largest,
    ),
    Metric(
        "routing_weight_std", "standard deviation of g", 0, "extended", "2606.10703 (code)",
        lambda s: _variance(s.scalar_m2_EM2[..., 0], s.count_EM).sqrt(),
    ),
    Metric(
        "routing_entropy", "-sum p ln p with p = g / sum g over X, nats: 0 for one token, ln N for equal weights", 0,
        "extended", "2606.10703 (code)", _entropy,
    ),
    Metric(
        "routing_gini", "sum_ij |g_i - g_j| / (2 N^2 mean g), from a histogram", 0, "extended", "2606.10703 (code)",
        lambda s: _gini(s)[0], error_bound=lambda s: _gini(s)[1],
    ),
    Metric("router_row_norm", "||router row of the expert||_2", 1, "extended", "MC-Suite", None),
    Metric("expert_weight_norm", "Frobenius norm of the expert's weights", 1, "extended", "MC-Suite", None),
    Metric("aimer", "mean |W| / rms W of the expert's weights", -1, "extended", "2603.18492", None),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _DEFINITIONS}
ALIASES: dict[str, str] = {alias: metric.name for metric in _DEFINITIONS for alias in metric.aliases}


def find_metric(name: str) -> Metric:
    """The metric of this name or alias. Raises ValueError for an unknown one."""
    metric = METRICS.get(ALIASES.get(name, name))
    if metric is None:
        raise ValueError(f"metric: {name!r} is unknown; known are {', '.join([*METRICS, *ALIASES])}")
    return metric


def metrics(
    observations: Observations, weight_statistics: pd.DataFrame | None = None, domain: str | None = None
) -> pd.DataFrame:
    """Every metric of every observed expert, long form: a row per (layer, expert, metric).

    Over all domains together, or over the tokens of the one named. Columns: layer, expert, n (tokens routed to the
    expert), metric, value, error_bound (of ``routing_gini``; 0 for the others), orientation, label. Metrics of
    weights are left out where ``weight_statistics`` (as ``weights.weight_statistics`` gives it, layers concatenated)
    is None. Raises ValueError for an unknown domain and for an observed layer without weight statistics.
    """
    frames = []
    for layer in sorted(observations.layers):
        sums = observations.pooled(layer, domain)
        weights = None if weight_statistics is None else _weights_of(weight_statistics, layer, observations.experts)
        for metric in METRICS.values():
            if metric.formula is not None:
                frame = _frame(layer, sums, metric.formula(sums))
            elif weights is not None:
                frame = _frame(layer, sums, torch.tensor(weights[metric.name].to_numpy())[:, None])
            else:
                continue
            frame["metric"] = metric.name
            frame["error_bound"] = metric.error_bound(sums)[:, 0].numpy() if metric.error_bound else 0.0
            frame["orientation"] = metric.orientation
            frame["label"] = metric.label
            frames.append(frame)
    columns = ["layer", "expert", "n", "metric", "value", "error_bound", "orientation", "label"]
    return pd.concat(frames, ignore_index=True)[columns]


def unified(observations: Observations, b: float, alpha: int, beta: int, domain: str | None = None) -> pd.DataFrame:
    """N^(-b) sum over X of g^alpha ||E||^beta (arXiv 2606.15716), columns layer, expert, n, value.

    (0,0,0) is the count, which orders experts as ``utilization`` does; (0,1,0) ``gate_sum``, (0,0,1) ``ean``, (1,1,1)
    ``reap``, (1,0,1) ``activation_norm``, (1,0,2) ``msan``. Raises ValueError where alpha or beta is not 0, 1 or 2:
    other powers are not accumulated.
    """
    for name, power in (("alpha", alpha), ("beta", beta)):
        if power not in (0, 1, 2):
            raise ValueError(f"unified.{name}: {power} is not accumulated; 0, 1 and 2 are")
    return _values(observations, lambda sums: _unified(sums, b, alpha, beta), domain)


def coactivation(observations: Observations, layer: int, domain: str | None = None) -> np.ndarray:
    """Tokens routed to both experts, int64 [E, E], symmetric; the diagonal is the count of each expert."""
    counts: np.ndarray = observations.pooled(layer, domain).coactivation_EME[:, 0].numpy()
    return counts


def super_experts(observations: Observations, total_layers: int, domain: str | None = None) -> pd.DataFrame:
    """Columns layer, expert, n, activation_max, super_expert (arXiv 2507.23279).

    A super expert's ``activation_max`` is above the 99.5 % quantile (linear interpolation) of all observed experts
    and above a tenth of their largest, and its layer index is below 75 % of ``total_layers``, the model's decoder
    layers. Experts without a token take no part and are never flagged. Quantile and largest are over the *observed*
    layers: observe all for the published definition.
    """
    table = _values(observations, _largest, domain).rename(columns={"value": "activation_max"})
    used = table["activation_max"].dropna()
    bar = max(used.quantile(0.995), used.max() / 10)
    early = table["layer"] < 0.75 * total_layers
    return table.assign(super_expert=(table["activation_max"] > bar) & early)


def _frame(layer: int, sums: LayerSums, value_EM: Tensor) -> pd.DataFrame:
    columns = {"expert": np.arange(len(value_EM)), "n": sums.count_EM[:, 0].numpy(), "value": value_EM[:, 0].numpy()}
    return pd.DataFrame({"layer": layer, **columns})


def _values(observations: Observations, formula: Callable[[LayerSums], Tensor], domain: str | None) -> pd.DataFrame:
    layers = {layer: observations.pooled(layer, domain) for layer in sorted(observations.layers)}
    return pd.concat([_frame(layer, sums, formula(sums)) for layer, sums in layers.items()], ignore_index=True)


def _weights_of(weight_statistics: pd.DataFrame, layer: int, experts: int) -> pd.DataFrame:
    rows = weight_statistics[weight_statistics["layer"] == layer].sort_values("expert")
    if list(rows["expert"]) != list(range(experts)):
        raise ValueError(f"weight_statistics: layer {layer} has {len(rows)} rows; one per expert ({experts}) is needed")
    return rows
