"""An audit on a cluster that has no workers: Ray's autoscaler brings as many as groups are wanted, and ends them.

The nodes are processes of this machine that Ray's own fake provider starts; ``ray.cluster_utils.AutoscalingCluster``
would end every Ray of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.audit import Audit, Losses
from benchmarks.faults.nodes import Nodes, autoscaled
from benchmarks.faults.trial import Trial

MOST = 2


@pytest.fixture(scope="module")
def nodes(no_ray: None) -> Iterator[Nodes]:
    with autoscaled(head_cpus=1, worker_cpus=1, max_workers=MOST, idle_seconds=3.0) as nodes:
        yield nodes


def test_workers_come_when_tasks_wait_and_go_when_none_do(nodes: Nodes, tmp_path: Path) -> None:
    assert nodes.raylets() == 1  # the head's
    trial = Trial(
        folder=str(tmp_path / "run"), state=str(tmp_path / "state"), tasks=30, seconds=0.5, min_groups=0, groups=MOST
    )
    audit = Audit(trial, nodes.environment()).start()
    seen = [nodes.raylets()]
    while (status := audit.wait(0.2)) is None:
        seen.append(nodes.raylets())
    assert status == 0, audit.said()
    assert max(seen) == 1 + MOST, (seen, audit.said())
    assert len({entry.pid for entry in audit.journal()}) >= MOST
    assert audit.losses() == Losses(0, 0, 0, 0)
    end = time.monotonic() + 60.0
    while nodes.raylets() > 1 and time.monotonic() < end:
        time.sleep(0.2)
    assert nodes.raylets() == 1


def test_resources_that_can_never_come_are_one_sentence(nodes: Nodes, tmp_path: Path) -> None:
    trial = Trial(folder=str(tmp_path / "run"), state=str(tmp_path / "state"), cpus=5)
    audit = Audit(trial, nodes.environment()).start()
    assert audit.finish() == 1
    (said,) = audit.said()
    assert "1 group needs 5 CPUs" in said
    assert said.endswith("its autoscaler cannot start what is missing")
    assert not (tmp_path / "run" / "run.json").exists()
