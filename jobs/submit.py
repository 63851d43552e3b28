"""Commands for audits that run as jobs on a cluster: submit, follow, status, stop. Each returns its exit status."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import fsspec

from audit.config import AuditConfig, ConfigError
from audit.runfolder import RunFolder, RunFolderError
from cluster.display import duration
from cluster.run import identity_of, refuse_other
from cluster.session import StopSignal
from cluster.submission.job_client import STOP_SECONDS, JobClient, JobState, UnreachableError, new_job_id
from cluster.submission.staging import check_here, covers, size, stage
from jobs import output
from jobs.console import complain, say

_LAST_LINES = 5
_STOPPED = "moe-audit: stopped"  # how the line begins that a stopped audit ends its log with


def submit(given: argparse.Namespace) -> int:
    """Start an audit as a job, with everything that is wrong and can be seen here said before."""
    config = AuditConfig.load(given.config, given.set)
    on_cluster = _absolute(given.on_cluster)
    check_here(config, on_cluster)
    forwarded = _forwarded(given.env)
    with tempfile.TemporaryDirectory(prefix="moe-audit-") as scratch:
        staged = stage(config, Path(given.config).name, Path(scratch, "job.zip"), on_cluster)
        client = JobClient(given.address)
        out = _reachable(given.out, client, on_cluster)
        if _is_local(out):
            folder = RunFolder(out)
            folder.require_usable()
            refuse_other(folder, {"specification": identity_of(staged.specification)})
        _refuse_second(out, client)
        job = given.job_id or new_job_id(config.name)
        command = [given.python, "-m", "jobs.run_audit", "--config", staged.config, "--out", out]
        say(f"uploading {size(staged.bytes)}, {len(staged.files)} files")
        client.submit(
            job,
            f"exec {shlex.join(command)}",  # so that a stop signal reaches Python and not a shell
            package=staged.package,
            metadata={"name": config.name, "out": out},
            env={**forwarded, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        )
    say(f"submitted {job}")
    for name in ("follow", "status", "stop"):
        say(f"  moe-audit {name} {job} --address {client.address}")
    return _followed(job, client) if given.follow else 0


def follow(given: argparse.Namespace) -> int:
    """Show what a job prints until it ends; returns the audit's own status."""
    return _followed(given.job, JobClient(given.address))


def status_of_job(job: str, address: str) -> int:
    """A job's state, how far its run folder has come, the last lines it printed."""
    client = JobClient(address)
    state = client.state(job)
    say(f"{job}: {_told(state)}")
    _show_folder(state, client)
    for line in client.log(job).splitlines()[-_LAST_LINES:]:
        say(f"  {line}")
    return 0


def stop(given: argparse.Namespace) -> int:
    """Ask a job to commit what is finished and to end, and wait until it has."""
    client = JobClient(given.address)
    state = client.state(given.job)
    if state.over:
        say(f"{given.job} has ended already: {_told(state)}")
        return 0
    say(f"stopping {given.job}: it has {STOP_SECONDS} seconds to commit what is finished")
    state = client.stop(given.job)
    said = [line for line in client.log(given.job).splitlines() if line.startswith(_STOPPED)]
    if state.state != "stopped":
        say(f"{given.job} ended by itself: {_told(state)}")
    elif said:
        say(said[-1].removeprefix("moe-audit: "))
    else:
        say("it ended before it could say what was committed; what is committed stays")
    return 0


# Before a job begins -------------------------------------------------------------------------------------------------


def _absolute(paths: Sequence[str]) -> list[Path]:
    for path in paths:
        if not os.path.isabs(path):
            raise ConfigError(f"--on-cluster: {path!r} is not absolute; name a path as it is on every node")
    return [Path(path) for path in paths]


def _forwarded(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if name not in os.environ:
            raise ConfigError(f"--env: {name!r} is not set here; set it, or leave it out")
    return {name: os.environ[name] for name in names}


def _is_local(url: str) -> bool:
    try:
        return issubclass(
            fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file"),
            fsspec.get_filesystem_class("file"),
        )
    except ImportError:  # of a protocol that fsspec knows and nothing here speaks; the cluster may
        return False
    except ValueError as error:
        raise ConfigError(f"--out: {url!r} cannot be used ({error}); name a URL such as s3://bucket/run1") from error


def _reachable(out: str, client: JobClient, on_cluster: Sequence[Path]) -> str:
    """``--out`` as the cluster's nodes will understand it."""
    if not _is_local(out):
        return out.rstrip("/")
    path = os.path.abspath(os.path.expanduser(out.removeprefix("file://")))
    if covers(on_cluster, path) or client.is_this_machine():
        return path
    raise RunFolderError(
        f"--out: {out!r} is a path, and the cluster's nodes are other machines; name a URL such as s3://bucket/run1, "
        f"or add --on-cluster {os.path.dirname(path)} if every node and this machine have it in common"
    )


def _refuse_second(out: str, client: JobClient) -> None:
    """Two drivers on one folder: a local one is locked, but on an object store each would do the other's work again."""
    for state in client.states():
        if not state.over and state.metadata.get("out") == out:
            raise RunFolderError(f"--out: {out} is in use by the job {state.id}; follow it, stop it, or name another")


# While it runs and afterwards ----------------------------------------------------------------------------------------


def _followed(job: str, client: JobClient) -> int:
    try:
        state = client.follow(job, _write, complain)
    except StopSignal as signal:
        command = f"moe-audit follow {job} --address {client.address}"
        complain(f"{job} goes on without you; `{command}` shows it again, `moe-audit stop` ends it")
        return signal.status
    except UnreachableError as error:
        complain(str(error))
        return 1
    if state.state != "succeeded":
        complain(f"{job}: {_told(state)}")
    return state.exit_status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _told(state: JobState) -> str:
    """A job's state in a sentence."""
    if state.started is None:
        took = ""
    elif state.ended is None:
        took = f" for {duration(time.time() - state.started)}"
    else:
        took = f" after {duration(state.ended - state.started)}"
    if state.exit_code is not None or not state.over:
        return f"{state.state}{took}" + (f", exit status {state.exit_status}" if state.exit_status else "")
    # It never began, or was ended from outside, and only the cluster knows why.
    why = [line for line in state.message.strip().splitlines() if line.strip()]
    return f"{state.state}{took}" + (f": {why[-1].strip()}" if why and state.state == "failed" else "")


def _show_folder(state: JobState, client: JobClient) -> None:
    out = state.metadata.get("out")
    if out is None:
        say("it was not begun by moe-audit submit, which notes where the run folder is")
        return
    try:
        folder = RunFolder(out)
        if folder.holds_run():
            output.show_status(folder, folder.require_run())
        elif _is_local(out) and not client.is_this_machine() and not os.path.isdir(os.path.dirname(out)):
            say(f"run folder {out}: on the cluster, not to be seen from here")
        else:
            say(f"run folder {out}: nothing is written yet")
    except (ImportError, OSError, ValueError) as error:  # no driver, no network, no right to read: said, and no more
        say(f"run folder {out}: cannot be read from here ({' '.join(str(error).split())})")
