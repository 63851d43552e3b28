"""Progressive ablation: what a token loses as more and more of its active experts are removed, in different orders.

At one layer the first 1, 2, ... k - 1 of the k active experts in an order are removed together (``zero``). Orders: by
routing weight, highest first (``highest``) or lowest first (``lowest``); at random (``random``, several draws); by a
metric, most important first (``ranked:<metric>``; one that claims no orientation ranks by its value as it stands). If a
metric knows which experts matter, its order does more harm at every count than a random one. Source: arXiv 2606.10703;
the comparison of areas is of this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.interventions import COUNTED, Intervention, Target
from audit.statistics.bootstrap import Interval, mean_interval

COMPARED = ("delta_loss", "kl")
_TOKEN = ["document", "sequence", "position"]
_CURVE = ["scope", "layer", "order"]
_NEEDED = [*_TOKEN, "scope", "layer", "intervention", "target", "parameter", "draw", "delta_loss", "kl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveSettings:
    """``cliff``: nats of mean delta_loss above which an order's cliff lies. ``level`` of the bootstrap intervals."""

    cliff: float = 0.1
    level: float = 0.95
    bootstrap_draws: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.cliff > 0:
            raise ValueError(f"progressive.cliff: {self.cliff} is not possible; it is a number of nats above 0")
        if not 0 < self.level < 1:
            raise ValueError(f"progressive.level: {self.level} is not possible; it lies between 0 and 1")
        if self.bootstrap_draws < 1:
            raise ValueError(f"progressive.bootstrap_draws: {self.bootstrap_draws} is not possible; use 1 or more")


def progressive_interventions(top_k: int, metrics: Sequence[str], draws: int) -> tuple[Intervention, ...]:
    """Removals of 1 to ``top_k`` - 1 of a token's ``top_k`` active experts in every order, ``draws`` of the random one.

    Measuring them needs the values of the metrics: ``Engine.measure(..., rankings=...)``. Raises ValueError.
    """
    if top_k < 2:
        raise ValueError(f"top_k: {top_k} active expert leaves nothing between none and all removed; at least 2 needed")
    if draws < 1:
        raise ValueError(f"draws: {draws} random orders are not possible; use at least 1, better 20")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics: {list(metrics)} names a metric twice; name each once")
    counts = range(1, top_k)
    return (
        *(Intervention("zero", Target("highest", count=count)) for count in counts),
        *(Intervention("zero", Target("lowest", count=count)) for count in counts),
        *(Intervention("zero", Target("random", count=count), draws=draws) for count in counts),
        *(Intervention("zero", Target("ranked", count=n, metric=metric)) for metric in metrics for n in counts),
    )


def progressive_table(effects: pd.DataFrame, settings: ProgressiveSettings | None = None) -> pd.DataFrame:
    """A row per (scope, layer, order, count) of the ``zero`` removals in an effect table; other rows are not read.

    Columns: ``tokens``; ``n``: those with a delta_loss (the last of a sequence has no next token); ``documents`` of
    these; ``draws``; ``nonfinite``: removals (token, draw) whose delta_loss or kl is not a finite number, in no
    statistic. ``mean``, with ``low`` and ``high`` (BCa bootstrap by document), of delta_loss, nats: over tokens, of a
    random order the token's mean over its draws. ``median``, ``p95`` and ``share_positive`` (delta_loss > 0) are of
    single removals, not of means over draws, which would be less spread than any removal is. ``mean_kl``, nats, as
    ``mean``. ``sd_draws``: standard deviation (ddof 1) over the draws of each draw's mean delta_loss, of random orders
    alone. ``cliff``, the same along an order: the first count with a mean above ``settings.cliff``; null for the reason
    in ``cliff_reason``. ``reason`` says why another value is null. Raises ValueError for a table without such removals.
    """
    settings = settings or ProgressiveSettings()
    table = pd.DataFrame([_point(key, rows, settings) for key, rows in _cells(_removals(effects))])
    parts = [_with_cliff(rows, settings.cliff) for _, rows in table.groupby(_CURVE, sort=False)]
    return pd.concat(parts, ignore_index=True).astype({"cliff": "Int64"})


def area_table(effects: pd.DataFrame, settings: ProgressiveSettings | None = None) -> pd.DataFrame:
    """A row per (scope, layer, order, outcome): the area under the order's curve against that of the random order.

    ``area`` (nats): the mean over the counts of the mean outcome, which is the area under the curve in steps of one
    expert over its width. ``difference`` = ``area`` - ``area_random``, with ``low`` and ``high`` (BCa bootstrap by
    document), token by token, a random order's draws averaged first: above 0, removing in this order does more harm.
    ``counts``: how many counts are compared, those that both orders have. ``n`` tokens (of ``documents``) have a finite
    outcome at all of them under both orders; ``left_out`` have one at some of them only. ``reason`` says why a value is
    null. Outcomes: ``COMPARED``. Raises ValueError as ``progressive_table``.
    """
    settings = settings or ProgressiveSettings()
    removals = _removals(effects)
    rows = []
    for (scope, layer), of_layer in removals.groupby(["scope", "layer"], sort=True):
        for outcome in COMPARED:
            curves = _curves(of_layer, outcome)
            for order in sorted(set(curves) - {"random"}, key=_place):
                key = {"scope": scope, "layer": layer, "order": order, "outcome": outcome}
                rows.append(key | _compared(curves[order], curves.get("random"), settings))
    return pd.DataFrame(rows)


def _removals(effects: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in _NEEDED if name not in effects]
    if missing:
        raise ValueError(f"effects: the columns {', '.join(missing)} are missing; give the effect table with them")
    order = effects["target"].astype("string").fillna("")
    ordered = order.isin(COUNTED) | order.str.startswith("ranked:")
    chosen = (ordered & (effects["intervention"].astype("string") == "zero")).to_numpy(bool)
    if not chosen.any():
        raise ValueError(
            f"effects: no row removes (zero) the first of a token's experts in an order ({', '.join(COUNTED)}); "
            "measure progressive_interventions"
        )
    rows = effects.loc[chosen, _NEEDED].reset_index(drop=True)
    rows = rows.assign(
        scope=rows["scope"].astype(str),
        order=rows["target"].astype(str),
        count=rows["parameter"].astype(int),
        draw=rows["draw"].fillna(0).astype(int),  # null but for random orders
        **{name: rows[name].astype(np.float64) for name in COMPARED},
    )
    twice = rows.duplicated([*_CURVE, "count", *_TOKEN, "draw"])
    if twice.any():
        told = rows.loc[twice, [*_CURVE, "count", *_TOKEN]].iloc[0].to_dict()
        raise ValueError(f"effects: {int(twice.sum())} removals are there twice, such as {told}; give each once")
    return rows


def _cells(removals: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The removals of every (scope, layer, order, count), curve by curve."""
    names = [*_CURVE, "count"]
    found: list[tuple[dict[str, Any], pd.DataFrame]] = [
        (dict(zip(names, key, strict=True)), rows) for key, rows in removals.groupby(names, sort=False)
    ]
    yield from sorted(found, key=lambda c: (c[0]["scope"], c[0]["layer"], _place(c[0]["order"]), c[0]["count"]))


def _place(order: str) -> tuple[int, str]:
    return (COUNTED.index(order) if order in COUNTED else len(COUNTED), order)


def _point(key: dict[str, Any], rows: pd.DataFrame, settings: ProgressiveSettings) -> dict[str, Any]:
    """One point of a curve, with its spread."""
    loss = rows.loc[np.isfinite(rows["delta_loss"])]
    token = _by_token(loss, "delta_loss")
    document_N = token.index.get_level_values("document").to_numpy()
    mean = _interval(token.to_numpy(), document_N, settings)
    single = loss["delta_loss"].to_numpy()
    draw_means = loss.groupby("draw")["delta_loss"].mean()
    is_random, reasons = key["order"] == "random", [mean.reason]
    if is_random and len(single) and len(draw_means) < 2:
        reasons.append("one draw: no spread over draws")
    kl = rows.loc[np.isfinite(rows["kl"])]
    return key | {
        "tokens": len(rows[_TOKEN].drop_duplicates()),
        "n": len(token),
        "documents": len(np.unique(document_N)),
        "draws": rows["draw"].nunique(),
        "nonfinite": int((np.isinf(rows["delta_loss"]) | ~np.isfinite(rows["kl"])).sum()),
        "mean": _mean(token.to_numpy()),
        "low": mean.low,
        "high": mean.high,
        "median": float(np.median(single)) if len(single) else np.nan,
        "p95": float(np.quantile(single, 0.95)) if len(single) else np.nan,
        "share_positive": _mean(single > 0),
        "mean_kl": _mean(_by_token(kl, "kl").to_numpy()),
        "sd_draws": float(draw_means.std()) if is_random and len(draw_means) > 1 else np.nan,
        "reason": "; ".join(filter(None, reasons)),
    }


def _with_cliff(curve: pd.DataFrame, cliff: float) -> pd.DataFrame:
    count_P, mean_P = curve["count"].to_numpy(), curve["mean"].to_numpy()
    if (mean_P > cliff).any():
        return curve.assign(cliff=count_P[mean_P > cliff].min(), cliff_reason="")
    if np.isnan(mean_P).all():
        reason = "no token has a delta_loss"
    else:
        top = np.nanargmax(mean_P)
        reason = f"no mean above {cliff:g} nat; the largest is {mean_P[top]:.3g} with {count_P[top]} removed"
    return curve.assign(cliff=np.nan, cliff_reason=reason)


def _curves(removals: pd.DataFrame, outcome: str) -> dict[str, pd.DataFrame]:
    """Per order the outcome of every token (rows) at every count (columns), a random order's draws averaged."""
    found: dict[str, pd.DataFrame] = {}
    for order, rows in removals.groupby("order", sort=False):
        finite = rows.assign(value=rows[outcome].where(np.isfinite(rows[outcome])))
        found[str(order)] = finite.groupby([*_TOKEN, "count"])["value"].mean().unstack("count")
    return found


def _compared(own: pd.DataFrame, random: pd.DataFrame | None, settings: ProgressiveSettings) -> dict[str, Any]:
    counts = own.columns if random is None else own.columns.intersection(random.columns)
    curves = [own[counts]] if random is None else [own[counts], random[counts]]
    areas = pd.concat([curve.mean(axis=1, skipna=False) for curve in curves], axis=1)
    used = areas.dropna()
    area_N, random_N = used[0].to_numpy(), np.full(len(used), np.nan) if random is None else used[1].to_numpy()
    difference_N, document_N = area_N - random_N, used.index.get_level_values("document").to_numpy()
    if random is None:
        interval = Interval(low=np.nan, high=np.nan, reason="no random order was measured")
    elif not len(counts):
        interval = Interval(low=np.nan, high=np.nan, reason="no count was measured in both orders")
    else:
        interval = _interval(difference_N, document_N, settings)
    return {
        "counts": len(counts),
        "n": len(used),
        "documents": len(np.unique(document_N)),
        "left_out": int(pd.concat(curves, axis=1).notna().any(axis=1).sum()) - len(used),
        "area": _mean(area_N),
        "area_random": _mean(random_N),
        "difference": _mean(difference_N),
        "low": interval.low,
        "high": interval.high,
        "reason": interval.reason,
    }


def _by_token(rows: pd.DataFrame, outcome: str) -> pd.Series[float]:
    """The mean of a token's removals: over draws, where there are several."""
    return rows.groupby(_TOKEN, sort=True)[outcome].mean()


def _interval(value_N: NDArray[np.floating[Any]], document_N: NDArray[Any], settings: ProgressiveSettings) -> Interval:
    if not len(value_N):
        return Interval(low=np.nan, high=np.nan, reason="no token has a finite outcome")
    _, cluster_N = np.unique(document_N, return_inverse=True)
    return mean_interval(
        value_N.astype(np.float64),
        cluster_N,
        level=settings.level,
        draws=settings.bootstrap_draws,
        seed=settings.seed,
    )


def _mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
