"""What an intervention may be, and what a layer can take."""

from __future__ import annotations

import pytest

from audit.interventions import KINDS, SELECTIONS, Intervention, Target


def test_defaults_remove_every_active_expert_by_itself() -> None:
    assert Intervention() == Intervention("zero", Target("each"), None, 1)
    assert set(KINDS) == {"zero", "renormalize", "reroute", "mean", "resample", "scale"}
    assert set(SELECTIONS) == {"each", "all", "highest", "lowest", "random", "ranked", "listed", "shared"}


def test_targets_are_named_with_the_metric_that_ranks() -> None:
    assert [Target("random", count=2).name, Target("all").name] == ["random", "all"]
    assert Target("ranked", count=2, metric="reap").name == "ranked:reap"


def test_what_chance_decides() -> None:
    assert Intervention("zero", Target("random", count=1), draws=20).drawn
    assert Intervention("resample", Target("ranked", count=1, metric="reap"), draws=2).drawn
    assert not Intervention("zero", Target("ranked", count=1, metric="reap")).drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": "top"}, "'top' is unknown; known are each, all"),
        ({"selection": "highest"}, "None experts cannot be removed; at least 1"),
        ({"selection": "lowest", "count": 0}, "0 experts cannot be removed; at least 1"),
        (
            {"selection": "each", "count": 2},
            "2 has no meaning for 'each'; it goes with highest, lowest, random, ranked",
        ),
        ({"selection": "random"}, "target.random: None experts cannot be removed"),
        ({"selection": "ranked", "count": 0, "metric": "reap"}, "target.ranked: 0 experts cannot be removed"),
        ({"selection": "ranked", "count": 1}, "target.metric: None does not fit 'ranked'; ranked needs the name"),
        ({"selection": "ranked", "count": 1, "metric": ""}, "target.metric: '' does not fit 'ranked'"),
        ({"selection": "highest", "count": 1, "metric": "reap"}, "'reap' does not fit 'highest'; .* others take none"),
        ({"selection": "random", "count": 1, "experts": (1,)}, "have no meaning for 'random'; use each or listed"),
        ({"selection": "listed"}, "a listed target needs at least one expert id"),
        ({"selection": "listed", "experts": ()}, "name at least one expert id"),
    ],
)
def test_targets_that_mean_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "remove"}, "'remove' is unknown; known are zero, renormalize"),
        ({"kind": "scale"}, "scale needs one, the others take none"),
        ({"kind": "zero", "factor": 0.5}, "scale needs one, the others take none"),
        ({"kind": "resample", "draws": 0}, "resample and random take 1 or more"),
        ({"kind": "mean", "draws": 2}, "'mean' with target 'each'; .* the others exactly 1"),
        ({"target": Target("random", count=1), "draws": 0}, "0 does not fit kind 'zero' with target 'random'"),
        ({"target": Target("ranked", count=1, metric="reap"), "draws": 2}, "2 does not fit .* with target 'ranked'"),
        ({"kind": "mean", "target": Target("shared")}, "shared experts take zero and scale, not 'mean'"),
        ({"kind": "reroute", "target": Target("shared")}, "shared experts take zero and scale, not 'reroute'"),
        ({"kind": "renormalize", "target": Target("all")}, "leaves nothing to carry their weight"),
        ({"kind": "reroute", "target": Target("all")}, "leaves nothing to carry their weight"),
    ],
)
def test_interventions_that_mean_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Intervention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("intervention", "layer", "message"),
    [
        (Intervention("zero", Target("highest", count=3)), (2, 8, False), "3 experts to remove, but a token has 2"),
        (Intervention("zero", Target("random", count=3)), (2, 8, False), r"target\.random: 3 experts to remove"),
        (Intervention("renormalize", Target("random", count=2)), (2, 8, False), "of all 2 active experts"),
        (
            Intervention("reroute", Target("ranked", count=2, metric="reap")),
            (3, 4, False),
            "reroute without 2 of 4 experts",
        ),
        (Intervention("renormalize"), (1, 8, False), "needs a second active expert"),
        (Intervention("renormalize", Target("lowest", count=2)), (2, 8, False), "of all 2 active experts"),
        (Intervention("reroute"), (2, 2, False), "without 1 of 2 experts leaves the router fewer than its top 2"),
        (Intervention("reroute", Target("highest", count=2)), (3, 4, False), "without 2 of 4 experts"),
        (Intervention("reroute", Target("listed", experts=(0, 1, 2))), (2, 4, False), "without 3 of 4 experts"),
        (Intervention("zero", Target("each", experts=(8,))), (2, 8, False), "8 is not an expert; the layer has 0 to 7"),
        (Intervention("zero", Target("listed", experts=(-1,))), (2, 8, False), "-1 is not an expert"),
        (Intervention("zero", Target("shared")), (2, 8, False), "this model has no shared experts"),
    ],
)
def test_layers_that_cannot_take_it(intervention: Intervention, layer: tuple[int, int, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intervention.check(*layer)


@pytest.mark.parametrize(
    ("intervention", "layer"),
    [
        (Intervention("zero"), (1, 1, False)),
        (Intervention("zero", Target("highest", count=2)), (2, 8, False)),
        (Intervention("renormalize", Target("lowest", count=1)), (2, 8, False)),
        (Intervention("reroute"), (2, 3, False)),
        (Intervention("reroute", Target("highest", count=2)), (2, 4, False)),
        (Intervention("zero", Target("each", experts=(0, 7))), (2, 8, False)),
        (Intervention("scale", Target("shared"), factor=0.5), (2, 8, True)),
    ],
)
def test_layers_that_just_can(intervention: Intervention, layer: tuple[int, int, bool]) -> None:
    assert intervention.check(*layer) is None
