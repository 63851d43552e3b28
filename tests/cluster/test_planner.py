"""The plan of the studies: what they measure beyond the audit's own effects, and what is refused before it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fake_engine import LAYERS, LENGTHS, FakeEngine, covered, planned

from audit.config import ConfigError
from audit.interventions import Intervention, Target
from audit.observations.registry import METRICS
from cluster.tasks import Task, digest

PROGRESSIVE = {"positions": 40, "draws": 4, "metrics": ["reap", "frequency"]}
REDUNDANCY = {"shares": [0.25, 0.5], "metrics": ["reap", "aimer"], "draws": 7}


def test_without_studies_there_are_no_stages_for_them() -> None:
    assert list(planned()) == ["observe", "merge", "effects"]
    assert not [task for task in planned()["observe"] if task.kind == "release"]


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_progressive_positions_are_among_the_audited_and_write_no_tokens(scope: str) -> None:
    stages = planned(scope=scope, studies={"progressive": PROGRESSIVE}, cluster={"task_minutes": 0.05})
    own, progressive = covered(stages["effects"]), covered(stages["progressive"])
    assert set(progressive) < set(own)
    assert set(progressive.values()) == {1}
    assert len({key[:2] for key in progressive}) == 40
    assert {layer for _, _, layer in progressive} == set(LAYERS)
    assert not any(task.tokens for task in stages["progressive"])
    assert not any(task.attribution or task.redistribution for task in stages["progressive"])
    assert digest(stages["effects"]) == digest(planned(scope=scope, cluster={"task_minutes": 0.05})["effects"])


def test_progressive_removes_in_every_order_and_waits_for_the_metrics() -> None:
    tasks = planned(studies={"progressive": {**PROGRESSIVE, "layers": [5]}})["progressive"]
    counts = (1, 2)  # of three active experts
    expected = {Intervention("zero", Target(s, count=n)) for s in ("highest", "lowest") for n in counts}
    expected |= {Intervention("zero", Target("random", count=n), draws=4) for n in counts}
    names = ("reap", "utilization")
    expected |= {Intervention("zero", Target("ranked", count=n, metric=name)) for name in names for n in counts}
    for task in tasks:
        assert set(task.interventions) == expected
        assert task.layers == (5,)
        assert task.needs == ("merge-calibration",)


def test_all_positions_where_there_are_fewer_than_asked_for() -> None:
    stages = planned(studies={"progressive": {**PROGRESSIVE, "positions": None}})
    assert covered(stages["progressive"]) == covered(stages["effects"])
    stages = planned(studies={"progressive": {**PROGRESSIVE, "positions": 100_000}})
    assert covered(stages["progressive"]) == covered(stages["effects"])


def test_attribution_and_redistribution_are_asked_of_the_audits_own_effects_alone() -> None:
    stages = planned(attribution=True, studies={"redistribution": True, "progressive": PROGRESSIVE})
    assert all(task.attribution and task.redistribution for task in stages["effects"])
    assert not any(task.attribution or task.redistribution for task in stages["progressive"])


@pytest.mark.parametrize("minutes", [1e-7, 1e-4, 100])
@pytest.mark.parametrize("source", ["calibration", "audited"])
def test_every_pruning_is_done_once_whatever_the_size_of_tasks(minutes: float, source: str) -> None:
    tasks = planned(
        studies={"redundancy": REDUNDANCY},
        calibration={"documents": 2, "from": source},
        cluster={"task_minutes": minutes},
    )["pruning"]
    done = Counter((p.criterion, p.order, p.draw, p.share, p.where) for task in tasks for p in task.prunings)
    orders = [(m, o, None) for m in ("reap", "aimer") for o in ("metric", "reverse")]
    orders += [("random", "random", draw) for draw in range(7)]
    places = [*(f"layer {n}" for n in LAYERS), "early third", "middle third", "late third", "all layers"]
    assert done == Counter({(*order, share, place): 1 for order in orders for share in (0.25, 0.5) for place in places})
    assert len(tasks) > 30 if minutes < 1 else len(tasks) <= len(done)
    audited = sorted(set(range(len(LENGTHS))) - calibration_of(source))
    for task in tasks:
        assert task.needs == (f"merge-{source}",)
        assert [s.index for s in task.sequences] == audited
        assert task.rows == len(task.prunings) * len(audited)


def calibration_of(source: str) -> set[int]:
    observe = planned(calibration={"documents": 2, "from": source})["observe"]
    return {s.index for task in observe if "-calibration-" in task.id for s in task.sequences}


def test_prunings_run_on_a_seeded_sample_of_documents() -> None:
    def documents(seed: int) -> set[int]:
        tasks = planned(seed=seed, studies={"redundancy": {**REDUNDANCY, "documents": 3}})["pruning"]
        return {s.document for task in tasks for s in task.sequences}

    assert len(documents(0)) == 3
    assert documents(0) == documents(0) != documents(1)


def test_the_released_code_reads_all_audited_texts_when_asked() -> None:
    (task,) = [t for t in planned(studies={"importance": {"released_code": True}})["observe"] if t.kind == "release"]
    assert task.id.startswith("observe-")  # counted with its stage
    assert [s.index for s in task.sequences] == sorted(set(range(len(LENGTHS))) - calibration_of("calibration"))
    assert task.layers == LAYERS
    assert task.needs == ()
    merged = {i for t in planned(studies={"importance": {"released_code": True}})["merge"] for i in t.inputs}
    assert task.id not in merged


def test_the_plan_does_not_depend_on_the_number_of_groups() -> None:
    studies = {
        "importance": {"released_code": True},
        "progressive": PROGRESSIVE,
        "redistribution": True,
        "redundancy": REDUNDANCY,
    }
    plans = [planned(studies=studies, cluster={"max_groups": n}) for n in (1, 4)]
    assert len({tuple(digest(tasks) for tasks in plan.values()) for plan in plans}) == 1
    assert [t.id for tasks in plans[0].values() for t in tasks] == [t.id for tasks in plans[1].values() for t in tasks]
    for stage, tasks in plans[0].items():
        assert all(task.id.startswith(f"{stage}-") for task in tasks)


def test_every_task_needs_earlier_ones_alone() -> None:
    studies = {"progressive": PROGRESSIVE, "redundancy": REDUNDANCY}
    known: set[str] = set()
    for tasks in planned(studies=studies, interventions=[{"kind": "zero"}, {"kind": "mean"}]).values():
        for task in tasks:
            assert set(task.needs) <= known
        known |= {task.id for task in tasks}


@pytest.mark.parametrize(
    "pair",
    [
        ({"target": {"random": 2}, "draws": 3}, {"target": {"random": 1}, "draws": 3}),
        ({"target": {"ranked": 2, "metric": "reap"}}, {"target": {"ranked": 2, "metric": "ean"}}),
        ({"target": {"ranked": 2, "metric": "reap"}}, {"target": {"highest": 2}}),
        ({"kind": "mean", "target": {"random": 2}}, {"kind": "zero", "target": {"random": 2}}),
        ({"kind": "scale", "factor": 0.5}, {"kind": "scale", "factor": 2.0}),
    ],
)
def test_interventions_the_table_tells_apart_are_measured_together(pair: tuple[dict[str, Any], ...]) -> None:
    (interventions,) = {task.interventions for task in planned(interventions=list(pair))["effects"]}
    assert len(interventions) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"interventions": [{"target": {"random": 2}, "draws": 3}, {"target": {"random": 2}, "draws": 5}]},
            r"^interventions\.1: .* interventions\.0 \(target random, zero, parameter 2\); give each",
        ),
        (
            {
                "interventions": [{}, {"target": {"ranked": 1, "metric": "reap"}}],
                "studies": {"progressive": PROGRESSIVE},
            },
            r"^studies\.progressive: it measures target ranked, zero, parameter 1 itself; take interventions\.1 out$",
        ),
        (
            {"studies": {"progressive": {**PROGRESSIVE, "layers": [1, 3]}}},
            r"^studies\.progressive\.layers: 3 is not audited; the layers are 1-2, 5$",
        ),
        (
            {"layers": [1], "studies": {"progressive": {**PROGRESSIVE, "layers": [2]}}},
            r"^studies\.progressive\.layers: 2 is not audited; the layers are 1$",
        ),
        (
            {"studies": {"importance": {"metrics": ["raep"]}}},
            r"^studies\.importance\.metrics: 'raep' is unknown; known",
        ),
        ({"studies": {"progressive": {"metrics": ["raep"]}}}, r"^studies\.progressive\.metrics: 'raep' is unknown"),
        ({"studies": {"redundancy": {"metrics": ["raep"]}}}, r"^studies\.redundancy\.metrics: 'raep' is unknown"),
        (
            {"interventions": [{"kind": "mean"}], "studies": {"redistribution": True}},
            r"^studies\.redistribution: True needs effects of zero on single experts; add",
        ),
        (
            {"studies": {"redundancy": {"shares": [0.1]}}},
            r"^studies\.redundancy\.shares: 0\.1 of the 8 experts of layer 1 removes none; at least 0\.125",
        ),
        (
            {"studies": {"redundancy": {"shares": [0.25, 0.75]}}},
            r"^studies\.redundancy\.shares: 6 of 8 experts cannot be removed, a token is routed to 3; at most 5 can$",
        ),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**settings)


def test_models_that_a_study_is_not_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^studies\.importance\.released_code: .*mixtral"):
        planned(FakeEngine(family="mixtral"), studies={"importance": {"released_code": True}})
    with pytest.raises(ConfigError, match=r"^studies\.redundancy: this model cannot be pruned, its router is odd$"):
        planned(FakeEngine(reroute_refused="its router is odd"), studies={"redundancy": REDUNDANCY})
    hashed = FakeEngine()
    for site in hashed.model.sites.values():
        site.router = None
    with pytest.raises(ConfigError, match=r"^studies\.importance\.metrics: 'aimer' needs experts' weights"):
        planned(hashed, studies={"importance": {"metrics": ["reap", "aimer"]}})
    tasks = planned(hashed, studies={"redundancy": {"draws": 1}})["pruning"]
    criteria = {pruning.criterion for task in tasks for pruning in task.prunings}
    assert "reap" in criteria
    assert {name for name, metric in METRICS.items() if metric.formula is None}.isdisjoint(criteria)


def test_tasks_are_told_apart_by_everything_they_do() -> None:
    """The digest a folder is bound to."""
    tasks = planned(studies={"progressive": PROGRESSIVE, "redundancy": REDUNDANCY})
    other = planned(studies={"progressive": {**PROGRESSIVE, "draws": 5}, "redundancy": {**REDUNDANCY, "draws": 8}})
    assert digest(tasks["progressive"]) != digest(other["progressive"])
    assert digest(tasks["pruning"]) != digest(other["pruning"])
    first = tasks["effects"][0]
    fields = {name: getattr(first, name) for name in Task.__slots__}
    for change in ({"tokens": False}, {"attribution": True}, {"redistribution": True}, {"layers": (1,)}):
        assert digest([first]) != digest([Task(**{**fields, **change})])
