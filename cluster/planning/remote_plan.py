"""The plan of a run on a cluster: made where a group would run, as the driver's machine may have no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from audit.config import AuditConfig
from cluster.driver.driver import RunError
from cluster.driver.group import Shape
from cluster.groups.ray_errors import in_plain_words
from cluster.groups.resources import could_hold, nodes, ranks_fit
from cluster.planning.plan import prepare
from cluster.run import Job
from cluster.session import ray_session

_RETRIES = 3  # nodes may be taken away while the plan is made


def prepare_for_run(
    config: AuditConfig,
    resolved: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    prepare: Callable[[AuditConfig, Mapping[str, Any] | None], Job] = prepare,
) -> Job:
    """As :func:`cluster.planning.plan.prepare`; on a GPU of the cluster where this process joins one, having none.

    ``max_groups: auto`` is then as many groups as the cluster holds now. Raises what ``prepare`` raises, and RunError
    where the process that makes the plan is lost again and again.
    """
    if not _joins_a_cluster():
        return prepare(config, resolved)
    with ray_session(1):
        shape = Shape(cpus=config.engine.threads, gpus=1)
        device = config.model.device if resolved is None else str(resolved["device"])
        if device == "cpu" or torch.cuda.is_available() or not could_hold(shape):
            job = prepare(config, resolved)
        else:
            say("making the plan on a GPU of the cluster, as this machine has none")
            job = _prepared_there(config, resolved, shape, prepare)
        if config.cluster.max_groups != "auto":
            return job
        most = max(job.scale.max_groups, ranks_fit(nodes(), job.shape) // job.shape.ranks)
        return replace(job, scale=replace(job.scale, max_groups=most))


def _joins_a_cluster() -> bool:
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def _prepared_there(
    config: AuditConfig,
    resolved: Mapping[str, Any] | None,
    shape: Shape,
    prepare: Callable[[AuditConfig, Mapping[str, Any] | None], Job],
) -> Job:
    # Its process ends with it, or it would keep what it holds of the device.
    there = ray.remote(num_cpus=shape.cpus, num_gpus=shape.gpus, max_calls=1)(prepare).options(
        max_retries=_RETRIES, name="moe-audit plan"
    )
    try:
        job: Job = ray.get(there.remote(config, resolved))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise RunError(f"the plan could not be made in {_RETRIES + 1} attempts: {in_plain_words(error)}") from error
    return job
