"""Where the plan of a run is made: on a GPU of the cluster where this machine has none, and otherwise here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from stub_worker import StubWorker

from audit.config import AuditConfig, ConfigError
from cluster import session
from cluster.driver.group import Shape
from cluster.driver.scaling import Scale
from cluster.planning.remote_plan import prepare_for_run
from cluster.run import Job


@pytest.fixture(scope="module")
def gpus(no_ray: None) -> Iterator[None]:
    """A cluster of this machine that declares two GPUs, which nobody computes on."""
    with session._scratch() as folder, session._own_token(), session._loopback_only():
        connected = session._connected(
            address="local", num_cpus=3, num_gpus=2, include_dashboard=False, _temp_dir=folder
        )
        with session._quiet(), connected:
            yield


def told(config: AuditConfig, resolved: Mapping[str, Any] | None) -> Job:
    """A plan that says where it was made and what of the cluster it was given."""
    if config.name == "mistaken":
        raise ConfigError("seed: 'x' cannot be used; it takes a whole number")
    where = {"process": os.getpid(), "gpus": len(ray.get_gpu_ids()) if ray.is_initialized() else 0}
    on_gpu = where["gpus"] > 0
    return Job(
        stages=[],
        identity={"resolved": resolved},
        information=where,
        make_worker=partial(StubWorker),
        scale=Scale(max_groups=1),
        shape=Shape(gpus=1 if on_gpu else 0),
    )


def config(**sections: Any) -> AuditConfig:
    return AuditConfig.parse(sections, Path())


@pytest.mark.usefixtures("gpus")
def test_the_plan_is_made_on_a_gpu_of_the_cluster() -> None:
    said: list[str] = []
    job = prepare_for_run(config(), None, said.append, told)
    assert job.information["process"] != os.getpid()
    assert job.information["gpus"] == 1
    assert job.scale.max_groups == 2  # of the cluster's GPUs; the plan saw one
    assert said == ["making the plan on a GPU of the cluster, as this machine has none"]


@pytest.mark.usefixtures("gpus")
def test_a_run_that_is_resumed_stays_on_its_kind_of_device() -> None:
    on_gpu = prepare_for_run(config(cluster={"max_groups": 1}), {"device": "cuda:0"}, prepare=told)
    assert on_gpu.scale.max_groups == 1
    assert (on_gpu.information["gpus"], on_gpu.identity["resolved"]) == (1, {"device": "cuda:0"})
    on_cpu = prepare_for_run(config(), {"device": "cpu"}, prepare=told)
    assert on_cpu.information == {"process": os.getpid(), "gpus": 0}


@pytest.mark.usefixtures("gpus")
def test_a_cpu_that_is_asked_for_is_one_here() -> None:
    here = prepare_for_run(config(model={"device": "cpu"}), prepare=told)
    assert here.information == {"process": os.getpid(), "gpus": 0}
    assert here.scale.max_groups == 2  # of three CPUs, one of which writes results


@pytest.mark.usefixtures("gpus")
def test_a_mistake_that_is_found_there_is_told_here() -> None:
    with pytest.raises(ConfigError) as found:
        prepare_for_run(config(name="mistaken"), prepare=told)
    assert str(found.value) == "seed: 'x' cannot be used; it takes a whole number"
    assert type(found.value) is ConfigError
