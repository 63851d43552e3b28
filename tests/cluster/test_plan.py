"""The plan of an audit's own effects, with an engine that only knows costs."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_engine import LAYERS, LENGTHS, covered, planned

from audit.config import ConfigError
from cluster.tasks import digest


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_every_position_and_layer_is_measured_once_and_its_token_written_once(scope: str) -> None:
    stages = planned(scope=scope, cluster={"task_minutes": 0.25})
    audited = {s.index for task in stages["effects"] for s in task.sequences}
    assert len(audited) == len(LENGTHS) - 2
    wanted = {(i, t, layer) for i in audited for t in range(1, LENGTHS[i]) for layer in LAYERS}
    assert covered(stages["effects"]) == Counter(wanted)
    tokens = Counter((i, t) for i, t, _ in covered([task for task in stages["effects"] if task.tokens]).elements())
    assert set(tokens) == {(i, t) for i, t, _ in wanted}
    whole = [task.layers for task in stages["effects"] if task.tokens]
    assert scope == "sequence" or set(whole) == {LAYERS}


def test_no_task_costs_more_than_asked_for_where_it_can_be_cut() -> None:
    for task in planned(cluster={"task_minutes": 0.25})["effects"]:
        assert task.flops <= 1.01 * 15 * 20e9
        assert task.rows == sum(map(len, task.positions)) * len(LAYERS)


def test_in_sequence_scope_a_long_sequence_is_cut_by_layers() -> None:
    stages = planned(scope="sequence", cluster={"task_minutes": 0.05})
    cut = [task for task in stages["effects"] if len(task.layers) < len(LAYERS)]
    assert cut
    for task in stages["effects"]:
        for s, at in zip(task.sequences, task.positions, strict=True):
            assert len(at) == len(s) - 1  # never by positions: one forward gives them all
    assert all(task.tokens == (task.layers[0] == LAYERS[0]) for task in stages["effects"])


def test_calibration_and_audited_documents_are_apart_and_merged_in_order() -> None:
    stages = planned(calibration={"documents": 2, "from": "audited"}, interventions=[{"kind": "mean"}])
    parts = {
        part: {s.index for t in stages["observe"] if f"-{part}-" in t.id for s in t.sequences}
        for part in ("calibration", "audited")
    }
    assert len(parts["calibration"]) == 2
    assert parts["audited"] == set(range(len(LENGTHS))) - parts["calibration"]
    assert {s.index for t in stages["effects"] for s in t.sequences} == parts["audited"]
    merge = {task.id: task.inputs for task in stages["merge"]}
    assert set(merge) == {"merge-calibration", "merge-audited"}
    assert list(merge["merge-audited"]) == sorted(t.id for t in stages["observe"] if "-audited-" in t.id)
    assert {t.needs for t in stages["effects"]} == {("merge-calibration",)}


def test_effects_that_draw_on_no_calibration_do_not_wait_for_it() -> None:
    assert {task.needs for task in planned()["effects"]} == {()}


def test_the_cut_does_not_depend_on_the_number_of_groups() -> None:
    one, four = planned(cluster={"max_groups": 1}), planned(cluster={"max_groups": 4})
    assert [digest(one[stage]) for stage in one] == [digest(four[stage]) for stage in four]
    assert digest(one["effects"]) != digest(planned(seed=1)["effects"])
    assert digest(one["effects"]) != digest(planned(interventions=[{"kind": "scale", "factor": 0.5}])["effects"])


def test_ids_begin_with_their_stage() -> None:
    for stage, tasks in planned().items():
        assert all(task.id.startswith(f"{stage}-") for task in tasks)


def test_effects_that_the_table_could_not_tell_apart_are_not_measured_together() -> None:
    sets = [{"kind": "zero", "target": {"listed": [1]}}, {"kind": "zero", "target": {"listed": [2, 3]}}]
    with pytest.raises(ConfigError, match=r"interventions\.1: .* interventions\.0 \(target listed, zero\)"):
        planned(interventions=sets)
    planned(interventions=[{"kind": "zero", "target": {s: 2}} for s in ("highest", "lowest")])
