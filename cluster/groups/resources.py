"""What the connected Ray cluster holds, and whether it could grow.

Ray has no public way to ask its autoscaler, so what is private is used in this module alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.v2.sdk import GcsClient
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.driver.driver import RunError
from cluster.driver.group import Shape
from cluster.driver.scaling import Scale

Resources = Mapping[str, float]
_NODE_GROUP = "ray.io/node-group"  # a label of the nodes that an autoscaler knows
_PROBE_SECONDS = 30.0  # an autoscaler looks at what is asked for every five seconds


def nodes() -> list[Resources]:
    """The resources of every living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def ranks_fit(nodes: Sequence[Resources], shape: Shape) -> int:
    """How many ranks these nodes hold beside each other, with one CPU left over for those who write results."""
    fit, spare = 0, False
    for node in nodes:
        cpus = node.get("CPU", 0.0)
        here = int(cpus // shape.cpus)
        if shape.gpus:
            here = min(here, int(node.get("GPU", 0.0) / shape.gpus))
        fit += here
        spare = spare or cpus - here * shape.cpus >= 1
    return fit if spare else max(0, fit - 1)


def told(nodes: Sequence[Resources]) -> str:
    """What these nodes hold together, for people."""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} with {cpus:g} CPUs and {gpus:g} GPUs"


def can_grow() -> bool:
    """Whether an autoscaler looks after the cluster."""
    return any(node["Labels"].get(_NODE_GROUP) for node in ray.nodes()) or _autoscaler().autoscaler_state_version > 0


def require_resources(shape: Shape, scale: Scale) -> str | None:
    """Raise RunError, one sentence, where the groups that must be there neither fit into the cluster nor ever will.

    Returns one sentence where they may come to fit, or where fewer fit than may be held.
    """
    needed = max(1, scale.min_groups)
    have = nodes()
    fit = ranks_fit(have, shape) // shape.ranks
    if fit >= scale.max_groups or (fit >= needed and can_grow()):
        return None
    if fit >= needed:
        asked = f"cluster.max_groups: {scale.max_groups} groups of {shape} may be held"
        return f"{asked}, and {fit} can: the Ray cluster has {told(have)}"
    field = "min_groups" if scale.min_groups > 1 else "ranks" if shape.ranks > 1 else "max_groups"
    value = {"min_groups": scale.min_groups, "ranks": shape.ranks, "max_groups": scale.max_groups}[field]
    groups = "1 group needs" if needed == 1 else f"{needed} groups need"
    need = (
        f"{groups} {shape}{' each' if needed > 1 else ''}, and writing results 1 CPU; the Ray cluster has {told(have)}"
    )
    if not can_grow():
        raise RunError(f"cluster.{field}: {value} cannot be held: {need}, and nothing that starts more")
    if not _could_launch(shape, needed):
        raise RunError(
            f"cluster.{field}: {value} cannot be held: {need}, and its autoscaler cannot start what is missing"
        )
    return f"waiting for resources: {need}, and its autoscaler is asked for the rest"


def could_hold(shape: Shape) -> bool:
    """Whether a group of this shape fits into the cluster, or may come to fit."""
    return ranks_fit(nodes(), shape) >= shape.ranks or (can_grow() and _could_launch(shape, 1))


def _could_launch(shape: Shape, groups: int) -> bool:
    """Ask the autoscaler by asking for the groups; yes where it has not said no in time."""
    asked = [bundles(shape, "probe") for _ in range(groups)]
    try:
        end = time.monotonic() + _PROBE_SECONDS
        while time.monotonic() < end:
            if all(group.wait(0.5) for group in asked):
                return True
            state = _autoscaler()
            if state.infeasible_gang_resource_requests:
                return False
            if state.pending_instance_requests or state.pending_instances:
                return True
    finally:
        for group in asked:
            remove_placement_group(group)
    return True


def bundles(shape: Shape, name: str) -> Any:
    """A placement group for one group, its ranks on one node where they fit; Ray wants its name to be unique."""
    each = {"CPU": float(shape.cpus)} | ({"GPU": float(shape.gpus)} if shape.gpus else {})
    return placement_group([each] * shape.ranks, strategy="PACK", name=f"{name}-{time.time_ns():x}")


def _autoscaler() -> Any:
    """What the second version of Ray's autoscaler reports; where there is none, a report of version 0."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return reply.autoscaling_state
