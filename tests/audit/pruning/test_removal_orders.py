"""Which experts a planned pruning removes, against orders written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from audit.pruning import Pruning, RemovalOrders, RouterLimits, plan_prunings


def _table(values: dict[str, list[float]], orientation: int = 1, layer: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"layer": layer, "expert": e, "metric": name, "value": v, "orientation": orientation}
            for name, column in values.items()
            for e, v in enumerate(column)
        ]
    )


def _pruning(share: float, order: str = "metric", criterion: str = "m", draw: int | None = None) -> Pruning:
    return Pruning(criterion=criterion, order=order, draw=draw, share=share, where="layer 0", layers=(0,))  # type: ignore[arg-type]


LIMITS = {0: RouterLimits(experts=8, top_k=2)}
VALUES = [0.5, 0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6]


@pytest.mark.parametrize(
    ("orientation", "order", "expected"),
    [
        (1, "metric", (1, 5)),
        (1, "reverse", (2, 4)),
        (-1, "metric", (2, 4)),
        (-1, "reverse", (1, 5)),
        (0, "metric", (1, 5)),
    ],
)
def test_the_least_important_go_first(orientation: int, order: str, expected: tuple[int, ...]) -> None:
    orders = RemovalOrders(_table({"m": VALUES}, orientation), LIMITS, seed=0)
    assert orders.removed(_pruning(0.25, order)) == {0: expected}


@pytest.mark.parametrize(("share", "count"), [(0.125, 1), (0.2, 1), (0.375, 3), (0.74, 5), (0.75, 6)])
def test_the_number_removed_is_rounded_down(share: float, count: int) -> None:
    assert len(RemovalOrders(_table({"m": VALUES}), LIMITS, seed=0).removed(_pruning(share))[0]) == count


def test_a_share_that_binary_cannot_hold_is_not_rounded_away() -> None:
    assert math.floor(0.29 * 100) == 28  # what must not happen
    orders = RemovalOrders(_table({"m": list(range(100))}), {0: RouterLimits(experts=100, top_k=2)}, seed=0)
    assert orders.removed(_pruning(0.29)) == {0: tuple(range(29))}


def test_experts_without_a_value_count_as_least_important() -> None:
    orders = RemovalOrders(_table({"m": [0.5, np.nan, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6]}), LIMITS, seed=0)
    assert orders.removed(_pruning(0.25)) == {0: (1, 5)}
    assert orders.order(0, "m", "reverse")[-1] == 1


def test_ties_are_broken_by_the_seed_and_never_by_number() -> None:
    removed = [
        RemovalOrders(_table({"m": [0.0] * 8}), LIMITS, seed=seed).removed(_pruning(0.25))[0] for seed in range(200)
    ]
    share = np.bincount([e for experts in removed for e in experts], minlength=8) / 200
    assert np.abs(share - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 200)  # each as often as any other


def test_random_draws_differ_and_larger_shares_hold_the_smaller() -> None:
    orders = RemovalOrders(_table({"m": VALUES}), LIMITS, seed=3)
    small, large = ([orders.removed(_pruning(s, "random", "random", d))[0] for d in range(50)] for s in (0.25, 0.5))
    assert len(set(small)) > 10
    assert all(set(a) < set(b) for a, b in zip(small, large, strict=True))


def test_groups_keep_what_the_router_needs() -> None:
    # Two groups of four, one of which is chosen, and three experts per token: each group must keep three.
    limits = {0: RouterLimits(experts=8, top_k=3, groups=2, groups_chosen=1)}
    orders = RemovalOrders(_table({"m": [1, 2, 3, 4, 5, 6, 7, 8]}), limits, seed=0)
    assert orders.removed(_pruning(0.25)) == {0: (0, 4)}  # 1 is passed over
    with pytest.raises(ValueError, match=r"3 of 8 experts cannot be removed.*3 in each of 2 groups.*at most 2 can"):
        orders.removed(_pruning(0.375))


def test_two_experts_stay_in_a_group_because_the_router_reads_two() -> None:
    assert RouterLimits(experts=256, top_k=8, groups=8, groups_chosen=4).least_per_group == 2
    assert RouterLimits(experts=16, top_k=1, groups=4, groups_chosen=2).least_per_group == 2


def test_mistakes_are_said_in_a_sentence() -> None:
    orders = RemovalOrders(_table({"m": VALUES, "nothing": [np.nan] * 8}), LIMITS, seed=0)
    for pruning, sentence in [
        (_pruning(0.9), r"share: 7 of 8 experts cannot be removed, a token is routed to 2; at most 6 can"),
        (_pruning(0.1), r"share: 0\.1 of the 8 experts of layer 0 removes none; at least 0\.125"),
        (_pruning(0.5, criterion="reap"), r"metrics: 'reap' has no values in layer 0; those that have: m, nothing"),
        (_pruning(0.5, criterion="nothing"), r"metrics: 'nothing' has no value for any expert of layer 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            orders.removed(pruning)
    with pytest.raises(ValueError, match=r"values for 7 experts of layer 0; one for each of its 8"):
        RemovalOrders(_table({"m": VALUES[:7]}), LIMITS, seed=0).removed(_pruning(0.25))


def test_the_plan_names_every_place_share_and_order_once() -> None:
    plan = plan_prunings([1, 2, 3, 4], ["a", "b"], shares=(0.25, 0.5), draws=3)
    places = {p.where: p.layers for p in plan}
    assert places == {
        "layer 1": (1,), "layer 2": (2,), "layer 3": (3,), "layer 4": (4,),
        "early third": (1, 2), "middle third": (3,), "late third": (4,), "all layers": (1, 2, 3, 4),
    }  # fmt: skip
    assert len(plan) == len(set(plan)) == 8 * 2 * (2 * 2 + 3)
    assert {p.draw for p in plan if p.order == "random"} == {0, 1, 2}
    assert {p.where for p in plan_prunings([5], ["a"], shares=(0.5,), draws=1)} == {"layer 5"}
