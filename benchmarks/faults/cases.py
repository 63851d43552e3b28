"""What can go wrong with an audit, one thing at a time: each case is done to a running one and then judged."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.audit import Audit, Losses, send
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.trial import Fault, Pause, Point, Trial

WORKERS, WORKER_CPUS = 2, 3
_HEADROOM_BYTES = 3 << 29  # above what is in use when the case begins, until Ray kills for memory

Disturb = Callable[[Audit, Nodes], float]  # returns when it did it, in seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``disturb``: what is done from outside; without it the trial's own faults strike. ``told``: what somebody reads
    of it, as a regular expression. ``status``: the driver's; where it is not 0 the cause is removed after, and the
    same command given again. ``local``: without a cluster to join, under these variables. ``full``: for the long tests.
    """

    name: str
    trial: Mapping[str, Any] = field(default_factory=dict)
    disturb: Disturb | None = None
    variables: Callable[[], Mapping[str, str]] = dict
    local: bool = False
    full: bool = False
    status: int = 0
    told: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """How a case went. ``seconds``: from the fault until work went on, which is when a task is begun again or by a new
    process, or where no group was disturbed when the next commit is through. None without a fault.
    """

    status: int
    quarantined: Sequence[str]
    losses: Losses
    results: Mapping[str, bytes]
    seconds: float | None
    said: Sequence[str]


def run_case(case: Case, nodes: Nodes, place: Path) -> Finding:
    """Do it to an audit whose files lie in ``place``. Raises AssertionError where the audit does not end."""
    while len(nodes.workers) < WORKERS:
        nodes.add(WORKER_CPUS)
    trial = Trial(folder=str(place / "run"), state=str(place / "state"), **case.trial)
    environment = dict(os.environ) if case.local else nodes.environment()
    audit = Audit(trial, {**environment, **case.variables()})
    audit.start()
    try:
        fault = None if case.disturb is None else case.disturb(audit, nodes)
        status = audit.finish()
    finally:
        audit.kill()
    if fault is None and trial.faults:
        fault = audit.struck()
    seconds = None if fault is None else audit.seconds_to_go_on(fault)
    if fault is not None and seconds is None:  # no group was disturbed
        seconds = audit.seconds_to_commit(fault)
    quarantined = []
    if status != 0:
        lines = Path(trial.folder, "quarantine.jsonl")
        quarantined = [json.loads(line)["task"] for line in lines.read_text().splitlines()] if lines.exists() else []
        if quarantined:  # the rest is complete
            assert audit.losses(without=tuple(quarantined)) == Losses(0, 0, 0, 0), "\n".join(audit.said())
        audit.cure()
        assert audit.start().finish() == 0, "\n".join(audit.said())
    return Finding(status, quarantined, audit.losses(), audit.results(), seconds, audit.said())


def _at_gate(audit: Audit) -> list[int]:
    """The processes of all groups, as soon as all of them wait at the gate."""
    wanted = audit.trial.groups * audit.trial.ranks

    def waiting() -> list[int]:
        ended = {entry.pid for entry in audit.journal() if entry.what == "ended"}
        return sorted(ended & set(audit.running()))

    audit.wait_until(120.0, lambda: len(waiting()) == wanted)
    return waiting()


def _signal_rank(number: signal.Signals) -> Disturb:
    def disturb(audit: Audit, nodes: Nodes) -> float:
        fault = send(_at_gate(audit)[0], number)
        audit.open_gate()
        return fault

    return disturb


def _kill_node(audit: Audit, nodes: Nodes) -> float:
    node = nodes.node_of(_at_gate(audit)[0])
    fault = time.time()
    nodes.kill(node)
    audit.open_gate()
    return fault


def _paused(point: Point) -> dict[str, Any]:
    """The driver waits at this point of a commit of the first two tasks, the groups at the gate."""
    return {"pauses": (Pause(point),), "gate": True, "policy": {"commit_results": 2}}


def _driver_killed(point: Point, when: str, *, told: str = "", full: bool = False) -> Case:
    def disturb(audit: Audit, nodes: Nodes) -> float:
        audit.wait_paused(point)
        fault = time.time()
        audit.kill()
        audit.open_gate()
        audit.start()
        return fault

    return Case(name=f"SIGKILL to the driver {when}", trial=_paused(point), disturb=disturb, told=told, full=full)


def _lose_answers(audit: Audit, nodes: Nodes) -> float:
    """The node that made the first answer dies when a commit is about to read it."""
    audit.wait_paused("answers")
    holder = next(entry.pid for entry in audit.journal() if entry.what == "ended")
    fault = time.time()
    nodes.kill(nodes.node_of(holder))
    audit.open_gate()
    audit.release("answers")
    return fault


def _little_memory() -> dict[str, str]:
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + _HEADROOM_BYTES) / memory.total
    return {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}


def _unreliable_calls(failures: int) -> Callable[[], Mapping[str, str]]:
    plan = {"num_failures": failures, "req_failure_prob": 25, "resp_failure_prob": 25}
    return lambda: {"RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": plan})}


# A call to it may be the first to fail; then it is asked whether it still answers.
_NODE_LOST = "was lost while it (ran effects-|was asked whether).*its node was lost"

UNDISTURBED = Case(name="nothing, 2 groups")
CASES = (
    Case(name="nothing, 1 group", trial={"groups": 1}, full=True),
    Case(name="nothing, 4 groups that end their tasks in another order", trial={"groups": 4, "order": 1}, full=True),
    Case(
        name="SIGKILL to a rank",
        trial={"gate": True},
        full=True,
        disturb=_signal_rank(signal.SIGKILL),
        told="was lost while it ran effects-",
    ),
    Case(
        name="SIGKILL to one of two ranks that hold a model together",
        trial={"groups": 1, "ranks": 2, "gate": True},
        full=True,
        disturb=_signal_rank(signal.SIGKILL),
        told="was lost while it ran effects-",
    ),
    Case(
        name="SIGSTOP to a rank",
        full=True,
        disturb=_signal_rank(signal.SIGSTOP),
        trial={"gate": True, "policy": {"hang_seconds": 15.0}},
        told="no answer within 15 seconds",
    ),
    Case(name="SIGKILL to a node", trial={"gate": True}, disturb=_kill_node, told=_NODE_LOST, full=True),
    Case(
        name="SIGKILL to a node, and the groups want every CPU that is left",
        disturb=_kill_node,
        trial={"groups": WORKER_CPUS, "gate": True},
        told=_NODE_LOST,
        full=True,
    ),
    _driver_killed("answers", "before the files", full=True),
    _driver_killed(
        "files", "between files and manifest", told="deleted 1 commits that an earlier run had begun", full=True
    ),
    _driver_killed("manifest", "after the manifest", full=True),
    Case(
        name="SIGKILL to the write task",
        trial={"faults": (Fault("effects", "write"),)},
        full=True,
        told="its writer is gone.*it is tried again in 1 s",
    ),
    Case(
        name="SIGKILL to every write task",
        trial={"faults": (Fault("effects", "write", times=None),)},
        status=1,
        full=True,
        told="could not be written, its writer is gone",
    ),
    Case(
        name="the answers of a node are lost before their commit",
        trial=_paused("answers"),
        disturb=_lose_answers,
        told="answered by is lost with the node",
    ),
    Case(
        name="out of memory",
        trial={"faults": (Fault("effects-0004", "memory"),)},
        local=True,
        variables=_little_memory,
        full=True,
        told="memory",
    ),
    Case(
        name="a task that always kills its process",
        full=True,
        trial={"faults": (Fault("effects-0004", "kill", times=None),)},
        status=1,
        told="effects-0004 is given up, quarantine.jsonl has the error",
    ),
    Case(
        name="a task that always answers a table of other columns",
        trial={"faults": (Fault("effects-0004", "misshapen", times=None),)},
        status=1,
        full=True,
        told="effects-0004 is quarantined after 3 attempts",
    ),
    Case(name="20 calls that fail", variables=_unreliable_calls(20), told="could not be reached", full=True),
)
