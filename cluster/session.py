"""A connection to Ray: a cluster of our own on this machine, or the one RAY_ADDRESS names; and stop signals."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
import ray.data

from cluster.driver import RunError

_SCRATCH = "/tmp/moe-audit-"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ray_session(cpus: int) -> Iterator[None]:
    """Within the block Ray is connected, for replicas that take ``cpus`` cores together.

    A connection this process already has is used as it is. Otherwise RAY_ADDRESS names the cluster to join, and without
    it one of our own is started, which writes nothing to the home directory, leaves nothing behind and declares one
    logical CPU more than cores: Ray Data needs a free one to write results, and waits for ever where there is none.
    """
    # A task's error is the driver's to tell; without this Ray prints it once more for every table it did not return.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    with _quiet():
        if ray.is_initialized():
            yield
        elif os.environ.get("RAY_ADDRESS"):
            with _connected():
                yield
        else:
            _use_own_token()
            # Nobody reads the metrics of a cluster without a dashboard, and gathering them takes 2 % of two cores.
            os.environ.setdefault("RAY_enable_metrics_collection", "0")
            # Ray starts workers at nice 15: on two busy cores they then lose a tenth to Ray's own processes.
            os.environ.setdefault("RAY_worker_niceness", "0")
            local = {"address": "local", "num_cpus": max(cores(), cpus) + 1, "include_dashboard": False}
            with _scratch() as folder, _connected(**local, _temp_dir=folder):
                yield


def require_resources(cpus: float, gpus: float) -> None:
    """Raise RunError where the connected cluster does not hold this much, and one CPU more for Ray Data."""
    have = ray.cluster_resources()
    for name, wanted in (("CPU", cpus + 1), ("GPU", gpus)):
        if have.get(name, 0) < wanted:
            raise RunError(f"cluster.replicas: needs {wanted:g} {name}s, the Ray cluster has {have.get(name, 0):g}")


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for Ray's own files, deleted afterwards; those that killed drivers could not delete are deleted first.

    It is directly below /tmp because socket paths end at 107 bytes, and TMPDIR may be deeper than Ray's leave room for.
    """
    for abandoned in glob.glob(f"{_SCRATCH}*/owner"):
        with suppress(OSError), open(abandoned, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the owner lives or is somebody else
            shutil.rmtree(os.path.dirname(abandoned))
    folder = tempfile.mkdtemp(prefix=os.path.basename(_SCRATCH), dir=os.path.dirname(_SCRATCH))
    try:
        with open(os.path.join(folder, "owner"), "wb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _connected(**options: Any) -> Iterator[None]:
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def _use_own_token() -> None:
    """Ray's local clusters ask for a token; this one lives in the environment of this process and those it starts.

    Without it Ray writes one to the home directory. It stays for the life of the process, because Ray reads it once.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints a paragraph for every process that ends early, where the driver says one line.

    Displays are not silenced: they keep the stream they were made with.
    """
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


@dataclass(slots=True)
class StopRequest:
    """The number of the signal that asked for a stop, 0 if none did."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C ask politely the first time; the second time they end the process.

    Enter it inside :func:`ray_session`: Ray installs handlers of its own, which end a driver within three seconds.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal:
            sys.exit(128 + number)
        request.signal = number

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
