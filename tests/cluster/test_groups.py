"""Groups of one and two ranks on a real Ray cluster of this machine."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from rank_workers import Apart, Together, refuse, slow
from ray.util.placement_group import placement_group_table
from stub_job import make_job, rows_of
from stub_worker import FaultPlan, tables

from audit.runfolder import RunFolder
from cluster.display import LineDisplay
from cluster.driver.driver import Policy, RunError
from cluster.driver.group import Group, GroupLostError, Result, Shape, TaskError
from cluster.driver.scaling import Scale
from cluster.groups import resources
from cluster.groups.ray_fleet import RayFleet
from cluster.run import execute
from cluster.tasks import Attempt, Task

pytestmark = pytest.mark.usefixtures("ray_cluster")

ADD = Attempt(Task(id="add", kind="measure"), 1)


def make_fleet(make_worker: Any, ranks: int = 1, own_tasks: bool = False) -> RayFleet:
    return RayFleet(
        make_worker, Shape(ranks=ranks, own_tasks=own_tasks), name=f"test-{time.time_ns():x}", patience=60.0
    )


def answered(fleet: RayFleet, group: Group, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if group in fleet.wait(1.0):
            return group.answer()
    raise AssertionError("no answer")


def loaded(fleet: RayFleet, name: str) -> Group:
    group = fleet.launch(name)
    answered(fleet, group)
    group.load()
    answered(fleet, group)
    return group


@pytest.fixture
def pair() -> Iterator[tuple[RayFleet, Group]]:
    fleet = make_fleet(Together, ranks=2)
    group = loaded(fleet, "pair")
    yield fleet, group
    group.kill()


def test_ranks_work_together_and_rank_0_answers(pair: tuple[RayFleet, Group]) -> None:
    fleet, group = pair
    assert group.node == ray.util.get_node_ip_address()
    for _ in range(3):
        group.submit([ADD])
        (result,) = answered(fleet, group)
        assert isinstance(result, Result)
        assert result.receipt["sum"] == 3.0
        assert ray.get(result.tables["effects"]).num_rows == result.receipt["rows"]["effects"]
    assert set(result.tables) == {"effects"}


@pytest.mark.parametrize(
    ("task", "said"),
    [("disagree", "rank 1 made other rows"), ("raise", "rank 1 does not want to")],  # rank 0 then waits for ever
)
def test_an_error_of_one_rank_is_the_tasks(pair: tuple[RayFleet, Group], task: str, said: str) -> None:
    fleet, group = pair
    group.submit([Attempt(Task(id=task, kind="measure"), 1)])
    (found,) = answered(fleet, group)
    assert isinstance(found, TaskError)
    assert said in str(found)
    assert found.recycle


def test_a_rank_that_dies_takes_its_group_with_it_and_nothing_is_left(pair: tuple[RayFleet, Group]) -> None:
    fleet, group = pair
    group.submit([Attempt(Task(id="kill", kind="measure"), 1)])
    with pytest.raises(GroupLostError, match=r"rank 1: its process was killed by the system or crashed \(process \d+"):
        answered(fleet, group)
    group.kill()
    again = loaded(fleet, "pair")  # under the same name, from scratch
    again.submit([ADD])
    assert answered(fleet, again)[0].receipt["sum"] == 3.0
    again.kill()
    places = [found for found in placement_group_table().values() if found["name"].startswith("pair-")]
    assert {found["state"] for found in places} == {"REMOVED"}


def test_ranks_with_tasks_of_their_own_answer_each_for_itself() -> None:
    fleet = make_fleet(Apart, ranks=3, own_tasks=True)
    assert fleet.side_by_side == 3
    group = loaded(fleet, "apart")
    group.submit([Attempt(Task(id=name, kind="measure"), 1) for name in ("one", "raise")])  # nothing for the third
    one, raised = answered(fleet, group)
    assert one.task == "one"
    assert one.receipt["rank"] == 0
    assert one.receipt["served"] == 1
    assert isinstance(raised, TaskError)
    assert "no such task" in str(raised)
    assert not raised.recycle
    group.submit([Attempt(Task(id=name, kind="measure"), 1) for name in ("one", "two", "three")])
    assert [found.receipt["rank"] for found in answered(fleet, group)] == [0, 1, 2]
    group.submit([Attempt(Task(id=name, kind="measure"), 1) for name in ("one", "kill", "three")])
    with pytest.raises(GroupLostError, match="rank 1: its process was killed"):
        answered(fleet, group)
    group.kill()


def test_a_worker_that_cannot_be_made_is_the_applications_error() -> None:
    fleet = make_fleet(refuse)
    group = fleet.launch("refused")
    answered(fleet, group)
    group.load()
    with pytest.raises(TaskError, match=r"model\.source: is gone"):
        answered(fleet, group)
    group.kill()


def test_nothing_is_heard_of_a_group_that_was_ended(tmp_path: Path) -> None:
    fleet = make_fleet(partial(slow, str(tmp_path)))
    group = loaded(fleet, "slow")
    group.submit([Attempt(make_job().stages[-1][1][0], 1)])
    assert fleet.wait(0.5) == []
    group.kill()
    assert fleet.wait(3.0) == []


def test_a_group_for_which_there_is_no_room_waits_and_says_what_it_needs() -> None:
    fleet = make_fleet(Together, ranks=50)
    group = fleet.launch("large")
    assert fleet.wait(1.0) == []
    assert fleet.capacity() == 0
    cpus = ray.cluster_resources()["CPU"]
    said = f"1 group needs 50 ranks of 1 CPU; the cluster has 1 node with {cpus:g} CPUs and 0 GPUs"
    assert fleet.wants(1) == said
    group.kill()


@pytest.mark.parametrize(
    ("shape", "scale", "told"),
    [
        (Shape(cpus=64), Scale(max_groups=3), "cluster.max_groups: 3 cannot be held: 1 group needs 64 CPUs, "),
        (Shape(gpus=1), Scale(max_groups=1), "cluster.max_groups: 1 cannot be held: 1 group needs 1 CPU and 1 GPU, "),
        (Shape(ranks=9), Scale(max_groups=1), "cluster.ranks: 9 cannot be held: 1 group needs 9 ranks of 1 CPU, "),
        (Shape(), Scale(min_groups=8, max_groups=9), "cluster.min_groups: 8 cannot be held: 8 groups need 1 CPU each"),
    ],
)
def test_what_never_fits_is_refused_in_one_sentence(shape: Shape, scale: Scale, told: str) -> None:
    with pytest.raises(RunError) as raised:
        resources.require_resources(shape, scale)
    text = str(raised.value)
    assert text.startswith(told)
    assert "the Ray cluster has 1 node with" in text
    assert "\n" not in text


def test_what_fits_in_part_is_said_and_what_fits_is_not() -> None:
    said = resources.require_resources(Shape(), Scale(max_groups=7))
    assert said is not None
    assert said.startswith("cluster.max_groups: 7 groups of 1 CPU may be held, and 2 can: the Ray cluster has 1 node")
    assert resources.require_resources(Shape(), Scale(max_groups=2)) is None


def test_ranks_are_counted_node_by_node_with_a_cpu_left_for_the_writer() -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0}, {"CPU": 8.0, "GPU": 8.0}]
    assert resources.ranks_fit(nodes, Shape()) == 14
    assert resources.ranks_fit(nodes, Shape(cpus=2)) == 7  # of the second node one CPU is left anyway
    assert resources.ranks_fit(nodes, Shape(cpus=1, gpus=1)) == 10
    assert resources.ranks_fit(nodes, Shape(cpus=9)) == 0
    assert resources.ranks_fit([{"CPU": 1.0}], Shape()) == 0


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.full  # a lost group and a killed process are in make test each by itself
def test_a_rank_killed_in_mid_task_costs_nothing(tmp_path: Path) -> None:
    """With the stub's tables, which depend on the task alone, so that one row lost or twice would be seen."""
    plan = FaultPlan({("effects-0002", 1): "kill"}, rank=1)
    folder, out = RunFolder(str(tmp_path)), io.StringIO()
    policy = Policy(commit_results=3, relaunch_seconds=0.0)
    outcome = execute(make_job(tasks=5, groups=1, ranks=2, plan=plan, policy=policy), folder, LineDisplay(out))
    assert outcome.exit_status == 0
    expected = [tables(task)["effects"] for task in make_job(tasks=5).stages[-1][1]]
    assert rows_of([folder.dataset("effects").to_table()]) == rows_of(expected)
    (loss,) = folder.lines("losses.jsonl")
    assert (loss["task"], loss["attempt"]) == ("effects-0002", 1)
    assert "rank 1: its process was killed by the system or crashed" in loss["reason"]
    assert "effects-0002 runs again on another group. What is committed stays." in out.getvalue()
