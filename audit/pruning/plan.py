"""The plan of a pruning study: which share of which layers' experts every criterion removes.

A plan needs no metric values; ``RemovalOrders`` holds them and says which experts a planned pruning removes. What is
removed in a layer depends on criterion, order, draw and share alone, so that pruning several layers removes in each
what pruning it alone does, and a larger share removes what a smaller one does and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.pruning.limits import RouterLimits

Order = Literal["metric", "reverse", "random"]
RANDOM = "random"  # the criterion of random draws

_TIES, _DRAWS = 0, 1  # keep the two streams of random numbers apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """One way to prune: ``share`` of the experts of each of ``layers``, in the order of a criterion.

    ``order``: ``metric`` removes first what the metric calls least important, ``reverse`` the most important,
    ``random`` a seeded draw, numbered ``draw`` (None for the others). ``where`` names the layers.
    """

    criterion: str
    order: Order
    draw: int | None
    share: float
    where: str
    layers: tuple[int, ...]


def plan_prunings(
    layers: Sequence[int], metrics: Sequence[str], *, shares: Sequence[float], draws: int
) -> list[Pruning]:
    """Every metric, its reverse and ``draws`` random orders, at every share and place.

    Places (this project): each MoE layer of ``layers`` alone, the early, middle and late third of them (where there are
    at least three; the earlier thirds take what is left over), all of them (where there are at least two).
    """
    orders: list[tuple[str, Order, int | None]] = []
    for metric in metrics:
        orders += [(metric, "metric", None), (metric, "reverse", None)]
    orders += [(RANDOM, "random", draw) for draw in range(draws)]
    return [
        Pruning(criterion=criterion, order=order, draw=draw, share=share, where=where, layers=places)
        for where, places in _places(sorted(layers)).items()
        for share in shares
        for criterion, order, draw in orders
    ]


def _places(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    places: dict[str, tuple[int, ...]] = {f"layer {layer}": (layer,) for layer in layers}
    if len(layers) >= 3:
        thirds = np.array_split(np.asarray(layers), 3)
        for name, third in zip(("early third", "middle third", "late third"), thirds, strict=True):
            places[name] = tuple(third.tolist())
    if len(layers) >= 2:
        places["all layers"] = tuple(layers)
    return places


class RemovalOrders:
    """The order in which every criterion removes a layer's experts.

    ``metric_table`` has the columns layer, expert, metric, value, orientation (``docs/tables.md``). The lowest oriented
    value goes first; a metric of orientation 0 makes no claim, and its lowest value goes first. An expert without a
    value (NaN: too few tokens were routed to it) counts as the least important. Ties are broken by one seeded draw per
    layer, never by expert number.
    """

    def __init__(self, metric_table: pd.DataFrame, limits: Mapping[int, RouterLimits], seed: int) -> None:
        self._table, self._limits, self._seed = metric_table, limits, seed
        self._known: dict[tuple[int, str], NDArray[np.float64]] = {}

    def order(self, layer: int, criterion: str, order: Order, draw: int | None = None) -> NDArray[np.int64]:
        """The layer's experts, those to remove first first. Raises ValueError where the metric has no values."""
        experts = self._limits[layer].experts
        if order == "random":
            assert draw is not None
            return np.random.default_rng([self._seed, _DRAWS, layer, draw]).permutation(experts)
        importance = self._importance(layer, criterion)
        shuffled = np.random.default_rng([self._seed, _TIES, layer]).permutation(experts)
        key = importance if order == "metric" else -importance
        return shuffled[np.argsort(key[shuffled], kind="stable")]

    def removed(self, pruning: Pruning) -> dict[int, tuple[int, ...]]:
        """The experts that ``pruning`` removes, by layer: floor(share x experts) of each.

        Raises ValueError where that is none, or more than the router can spare (``RouterLimits.first``).
        """
        removed: dict[int, tuple[int, ...]] = {}
        for layer in pruning.layers:
            limits = self._limits[layer]
            count = math.floor(pruning.share * limits.experts + 1e-9)  # 0.29 x 100 is below 29 in binary
            if count == 0:
                raise ValueError(
                    f"share: {pruning.share} of the {limits.experts} experts of layer {layer} removes none; "
                    f"at least {1 / limits.experts:.3g} removes one"
                )
            removed[layer] = limits.first(
                self.order(layer, pruning.criterion, pruning.order, pruning.draw).tolist(), count
            )
        return removed

    def _importance(self, layer: int, metric: str) -> NDArray[np.float64]:
        """Oriented values [E], high means important; -inf where there is none."""
        if (layer, metric) not in self._known:
            self._known[layer, metric] = self._oriented(layer, metric)
        return self._known[layer, metric]

    def _oriented(self, layer: int, metric: str) -> NDArray[np.float64]:
        experts = self._limits[layer].experts
        rows = self._table[self._table["layer"] == layer]
        named = rows[rows["metric"] == metric].sort_values("expert")
        if not len(named):
            known = ", ".join(sorted(set(rows["metric"].astype(str)))) or "none"
            raise ValueError(f"metrics: {metric!r} has no values in layer {layer}; those that have: {known}")
        if named["expert"].tolist() != list(range(experts)):
            raise ValueError(
                f"metrics: {metric!r} has values for {len(named)} experts of layer {layer}; one for each of its "
                f"{experts} is needed"
            )
        value = named["value"].to_numpy(np.float64)
        if np.isnan(value).all():
            raise ValueError(
                f"metrics: {metric!r} has no value for any expert of layer {layer}; more calibration tokens are needed"
            )
        orientation = int(named["orientation"].iloc[0])
        return np.where(np.isnan(value), -np.inf, value if orientation == 0 else value * orientation)
