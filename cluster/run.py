"""A run from beginning to end: calibration, effects, reduction; whatever an earlier run committed is not done again."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from audit.runfolder import RunFolder, RunFolderError, difference
from audit.storage import StorageError, storage_errors
from cluster.display import Display
from cluster.driver.driver import Driver, Policy, RunError, Stopped
from cluster.driver.group import Place, Shape
from cluster.driver.scaling import Scale
from cluster.groups.ray_fleet import RayFleet
from cluster.groups.resources import require_resources
from cluster.metrics import Metrics
from cluster.results import reducer
from cluster.results.committer import FolderCommitter
from cluster.session import cores, ray_session, stop_signals
from cluster.tasks import Task
from cluster.worker import Worker, make_worker

# May differ between two commands on one folder: they decide how the work is done and not one bit of what comes out.
# How many ranks hold a model together is no such thing: they add up an expert mixture in another order.
FREE = (
    ("name",),
    ("model", "offload_folder"),
    *(("cluster", key) for key in ("min_groups", "max_groups", "target_minutes", "max_attempts")),
    *(("cluster", key) for key in ("hang_minutes", "load_minutes", "commit_results", "commit_bytes")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that was thought through and not begun.

    ``stages``: (name, tasks) in order; a task ``needs`` earlier ones, by id. ``identity``: everything that
    decides the results' bits, which a folder is bound to. ``information``: what else run.json tells.
    """

    stages: Sequence[tuple[str, Sequence[Task]]]
    identity: Mapping[str, Any]
    information: Mapping[str, Any]
    make_worker: Callable[[str, Place], Worker]  # given the run folder's URL, in the process of a rank
    scale: Scale
    shape: Shape = field(default_factory=Shape)
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

    Raises, before any work is done, RunFolderError where the folder is another run's or a driver's, and StorageError
    where it cannot be used; RunError when the run cannot go on.
    """
    folder.tell(display.say)
    folder.require_usable()
    refuse_other(folder, job.identity)
    with folder.lock():
        if orphans := folder.delete_orphans():
            display.say(f"deleted {orphans} commits that an earlier run had begun and not finished")
        if _is_done(job, folder):
            return Outcome({}, ())
        with ray_session(job.scale.max_groups * job.shape.ranks * job.shape.cpus), Metrics() as metrics:
            if warning := require_resources(job.shape, job.scale):
                display.say(warning)
            if not folder.holds_run():
                folder.begin({"identity": job.identity, "run": job.digest, "created": time.time(), **job.information})
            # From here on there is something to commit first.
            with stop_signals() as stop, _storage_ends_the_run():
                fleet = RayFleet(
                    partial(make_worker, job.make_worker, folder.url),
                    job.shape,
                    name=f"moe-audit-{uuid.uuid4().hex[:8]}",
                    patience=max(job.policy.hang_seconds, job.policy.load_seconds),
                )
                committer = FolderCommitter(folder, job.digest, display.say)
                driver = Driver(
                    fleet, committer, folder, job.policy, job.scale, display, stop=stop, record=metrics.record
                )
                try:
                    outcome = _run_stages(job, folder, driver)
                except Stopped:
                    return Outcome({}, (), stop.signal)
                finally:
                    driver.close()
            if stop():  # it came when nothing was left to stop
                return Outcome(outcome.quarantined, outcome.blocked, stop.signal)
            with _storage_ends_the_run(), storage_errors(folder.url):
                if not reducer.is_reduced(folder):
                    display.say("reducing the effects to tables")
                    reducer.reduce(folder, metrics.noise_floor)
            return outcome


def reduce_again(folder: RunFolder, display: Display) -> list[str]:
    """Recompute every result from what is committed; returns the names of the files in results/.

    Raises RunFolderError where the folder holds no run or nothing is committed in it.
    """
    folder.tell(display.say)
    folder.require_run()
    if not folder.files("effects"):
        raise RunFolderError(f"{folder.url}: no effects are committed yet; finish the run first")
    with folder.lock(), ray_session(cores()), storage_errors(folder.url):
        display.say("reducing the effects to tables")
        return reducer.reduce(folder)


@contextmanager
def _storage_ends_the_run() -> Iterator[None]:
    """Within the block what storage refuses is a RunError: work was done, and what is committed stays."""
    try:
        yield
    except StorageError as error:
        raise RunError(str(error)) from error


def _is_done(job: Job, folder: RunFolder) -> bool:
    done = folder.done()
    return all(task.id in done for _, tasks in job.stages for task in tasks) and reducer.is_reduced(folder)


def _run_stages(job: Job, folder: RunFolder, driver: Driver) -> Outcome:
    quarantined: dict[str, str] = {}
    blocked: list[str] = []
    for number, (stage, tasks) in enumerate(job.stages):
        receipts = folder.done()
        folders = {id_: str(receipt["folder"]) for id_, receipt in receipts.items() if "folder" in receipt}
        ready: list[Task] = []
        for task in tasks:
            if all(id_ in folders for id_ in task.needs):
                ready.append(task)
            else:
                blocked.append(task.id)
        if any(task.id not in receipts for task in ready):
            found = [task.found(folders) for task in ready]
            later = [task for _, others in job.stages[number + 1 :] for task in others if task.id not in receipts]
            quarantined |= driver.run(stage, found, receipts, later).quarantined
    return Outcome(quarantined, blocked)
