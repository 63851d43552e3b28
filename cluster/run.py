"""A run from beginning to end: calibration, effects, reduction; whatever an earlier run committed is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from audit.runfolder import RunFolder, RunFolderError, difference
from cluster.display import Display
from cluster.driver import Driver, Policy, Stopped
from cluster.tasks import Task
from cluster.worker import Worker

# What may differ between two commands on one folder, because it decides how the work is done and not one bit of what comes out.
FREE = (("name",), ("cluster", "replicas"), ("cluster", "max_attempts"), ("cluster", "hang_minutes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that was thought through and not begun.

    ``stages``: (name, tasks) in order; a task's ``inputs`` are ids of earlier tasks. ``identity``: everything that decides the results' bits, which
    a folder is bound to. ``information``: what else run.json tells.
    """

    stages: Sequence[tuple[str, Sequence[Task]]]
    identity: Mapping[str, Any]
    information: Mapping[str, Any]
    make_worker: Callable[[str], Worker]  # given the run folder's URL, in the replica's process
    replicas: int
    cpus_per_replica: int = 1
    gpus_per_replica: float = 0
    policy: Policy = Policy()

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``signal``: the one that stopped it, or 0. ``blocked``: tasks not run because one they need was quarantined."""

    quarantined: Mapping[str, str]
    blocked: Sequence[str]
    signal: int = 0

    @property
    def exit_status(self) -> int:
        return 128 + self.signal if self.signal else int(bool(self.quarantined or self.blocked))


def identity_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The specification without what may differ between two commands on one folder."""
    kept = json.loads(json.dumps(specification, default=str))
    for *sections, name in FREE:
        section = kept
        for key in sections:
            section = section[key]
        section.pop(name, None)
    return dict(kept)


def refuse_other(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Raise RunFolderError, naming the field, where the folder holds a run of another identity (compared in the fields given)."""
    if not folder.holds_run():
        return
    old = folder.require_run()["identity"]
    new = json.loads(json.dumps(identity, default=str))
    for part in new:  # the specification comes first: a person changed that, the rest follows from it
        found = difference(old.get(part), new[part], part)
        if found:
            name, before, now = found
            name = name.removeprefix("specification.")
            raise RunFolderError(f"{name}: {folder.url} was begun with {before!r}, now it is {now!r}; name another --out, or set it back")


def execute(job: Job, folder: RunFolder, display: Display) -> Outcome:
    """Bring the job to its end in ``folder``; raises RunFolderError before anything is written, RunError when it cannot go on."""
    folder.require_usable()
    refuse_other(folder, job.identity)
    with folder.lock():
        if not folder.holds_run():
            folder.begin({"identity": job.identity, "run": job.digest, "created": time.time(), **job.information})
        if orphans := folder.delete_orphans():
            display.say(f"deleted {orphans} commits that an earlier run had begun and not finished")
        return _execute(job, folder, display)


def _execute(job: Job, folder: RunFolder, display: Display) -> Outcome:
    receipts = dict(folder.done())
    if all(task.id in receipts for _, tasks in job.stages for task in tasks) and not _needs_reduction(folder):
        return Outcome({}, ())

    from cluster import reducer
    from cluster.committer import FolderCommitter
    from cluster.ray_fleet import RayFleet, write_tables
    from cluster.session import ray_session, stop_signals

    quarantined: dict[str, str] = {}
    blocked: list[str] = []
    with ray_session(job.replicas, job.cpus_per_replica), stop_signals() as stop:
        fleet = RayFleet(job.replicas, partial(job.make_worker, folder.url), cpus=job.cpus_per_replica, gpus=job.gpus_per_replica)
        committer = FolderCommitter(folder, job.digest, write_tables)
        driver = Driver(fleet, committer, folder, job.policy, display, stop=stop)
        try:
            for stage, tasks in job.stages:
                ready = [_resolved(task, receipts) for task in tasks if all(id_ in receipts for id_ in task.inputs)]
                blocked += [task.id for task in tasks if any(id_ not in receipts for id_ in task.inputs)]
                if any(task.id not in receipts for task in ready):
                    quarantined |= driver.run(stage, ready, set(receipts)).quarantined
                    receipts = dict(folder.done())
        except Stopped:
            return Outcome(quarantined, blocked, stop.signal)
        finally:
            driver.close()
        if folder.files("effects") and not reducer.is_reduced(folder):
            display.say("reducing the effects to tables")
            reducer.reduce(folder)
        return Outcome(quarantined, blocked)


def _needs_reduction(folder: RunFolder) -> bool:
    if not folder.files("effects"):
        return False
    from cluster import reducer

    return not reducer.is_reduced(folder)


def _resolved(task: Task, receipts: Mapping[str, Mapping[str, Any]]) -> Task:
    """The task with the folders its inputs were saved in."""
    return replace(task, inputs=tuple(str(receipts[id_]["folder"]) for id_ in task.inputs))
