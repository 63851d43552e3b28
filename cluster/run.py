"""A run from beginning to end: calibration, effects, reduction; whatever an earlier run committed is not done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from audit.runfolder import RunFolder, RunFolderError, difference
from cluster import reducer
from cluster.committer import FolderCommitter
from cluster.display import Display
from cluster.driver import Driver, Policy, Stopped
from cluster.ray_fleet import RayFleet, write_tables
from cluster.session import cores, ray_session, require_resources, stop_signals
from cluster.tasks import Task
from cluster.worker import Worker

# May differ between two commands on one folder: they decide how the work is done and not one bit of what comes out.
FREE = (("name",), ("cluster", "replicas"), ("cluster", "max_attempts"), ("cluster", "hang_minutes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that was thought through and not begun.

    ``stages``: (name, tasks) in order; a task ``needs`` earlier ones, by id. ``identity``: everything that
    decides the results' bits, which a folder is bound to. ``information``: what else run.json tells.
    """

    stages: Sequence[tuple[str, Sequence[Task]]]
    identity: Mapping[str, Any]
    information: Mapping[str, Any]
    make_worker: Callable[[str], Worker]  # given the run folder's URL, in the replica's process
    replicas: int
    cpus_per_replica: int = 1
    gpus_per_replica: float = 0
    policy: Policy = field(default_factory=Policy)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``blocked``: tasks whose inputs were quarantined. ``signal``: the one that stopped it, or 0."""

    quarantined: Mapping[str, str]
    blocked: Sequence[str]
    signal: int = 0

    @property
    def exit_status(self) -> int:
        return 128 + self.signal if self.signal else int(bool(self.quarantined or self.blocked))


def identity_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The specification without what may differ between two commands on one folder."""
    kept: dict[str, Any] = json.loads(json.dumps(specification))
    for *sections, name in FREE:
        section = kept
        for key in sections:
            section = section[key]
        del section[name]
    return kept


def refuse_other(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Raise RunFolderError, naming the field, where the folder's run differs in one of the given parts of identity."""
    if not folder.holds_run():
        return
    old = folder.require_run()["identity"]
    new = json.loads(json.dumps(identity, default=str))
    for part in new:  # in the order given: what a person wrote comes before what follows from it
        found = difference(old.get(part), new[part], part)
        if found:
            name, before, now = found
            begun = f"{folder.url} was begun with {before!r}, now it is {now!r}"
            raise RunFolderError(f"{name.removeprefix('specification.')}: {begun}; name another --out, or set it back")


def execute(job: Job, folder: RunFolder, display: Display) -> Outcome:
    """Bring the job to its end in ``folder``.

    Raises RunFolderError, before anything is written, where the folder is another run's; RunError when it cannot go on.
    """
    folder.require_usable()
    refuse_other(folder, job.identity)
    with folder.lock():
        if orphans := folder.delete_orphans():
            display.say(f"deleted {orphans} commits that an earlier run had begun and not finished")
        if _is_done(job, folder):
            return Outcome({}, ())
        with ray_session(job.replicas * job.cpus_per_replica), stop_signals() as stop:
            require_resources(job.replicas * job.cpus_per_replica, job.replicas * job.gpus_per_replica)
            if not folder.holds_run():
                folder.begin({"identity": job.identity, "run": job.digest, "created": time.time(), **job.information})
            fleet = RayFleet(
                job.replicas, partial(job.make_worker, folder.url), cpus=job.cpus_per_replica, gpus=job.gpus_per_replica
            )
            committer = FolderCommitter(folder, job.digest, write_tables)
            driver = Driver(fleet, committer, folder, job.policy, display, stop=stop)
            try:
                outcome = _run_stages(job, folder, driver)
            except Stopped:
                return Outcome({}, (), stop.signal)
            finally:
                driver.close()
            if not reducer.is_reduced(folder):
                display.say("reducing the effects to tables")
                reducer.reduce(folder)
            return outcome


def reduce_again(folder: RunFolder, display: Display) -> list[str]:
    """Recompute every result from what is committed; returns the names of the files in results/.

    Raises RunFolderError where the folder holds no run or nothing is committed in it.
    """
    folder.require_run()
    if not folder.files("effects"):
        raise RunFolderError(f"{folder.url}: no effects are committed yet; finish the run first")
    with folder.lock(), ray_session(cores()):
        display.say("reducing the effects to tables")
        return reducer.reduce(folder)


def _is_done(job: Job, folder: RunFolder) -> bool:
    done = folder.done()
    return all(task.id in done for _, tasks in job.stages for task in tasks) and reducer.is_reduced(folder)


def _run_stages(job: Job, folder: RunFolder, driver: Driver) -> Outcome:
    quarantined: dict[str, str] = {}
    blocked: list[str] = []
    for stage, tasks in job.stages:
        receipts = folder.done()
        folders = {id_: str(receipt["folder"]) for id_, receipt in receipts.items() if "folder" in receipt}
        ready = [task for task in tasks if all(id_ in folders for id_ in task.needs)]
        blocked += [task.id for task in tasks if task not in ready]
        if any(task.id not in receipts for task in ready):
            found = [task.found(folders) for task in ready]
            quarantined |= driver.run(stage, found, set(receipts)).quarantined
    return Outcome(quarantined, blocked)
