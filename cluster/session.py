"""A connection to Ray: a cluster of our own on this machine, or the one RAY_ADDRESS names; and stop signals."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
import ray.data
from ray._private import ray_constants

_SCRATCH = "/tmp/moe-audit-"
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ray_session(cpus: int) -> Iterator[None]:
    """Within the block Ray is connected, for groups that take ``cpus`` cores together.

    A connection this process already has is used as it is. Otherwise RAY_ADDRESS names the cluster to join, and without
    it one of our own is started, which writes nothing to the home directory, leaves nothing behind and declares one
    logical CPU more than cores: Ray Data needs a free one to write results, and waits for ever where there is none.
    """
    # A task's error is the driver's to tell; without this Ray prints it once more for every table it did not return.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A task that a node has no memory for, Ray starts again for ever and says nothing; after this often it is an error.
    os.environ.setdefault("RAY_task_oom_retries", "3")
    with _quiet():
        if ray.is_initialized():
            yield
        elif os.environ.get("RAY_ADDRESS"):
            with _connected():
                yield
        else:
            # Nobody reads the metrics of a cluster without a dashboard, and gathering them takes 2 % of two cores.
            os.environ.setdefault("RAY_enable_metrics_collection", "0")
            # Ray starts workers at nice 15: on two busy cores they then lose a tenth to Ray's own processes.
            os.environ.setdefault("RAY_worker_niceness", "0")
            local = {"address": "local", "num_cpus": max(cores(), cpus) + 1, "include_dashboard": False}
            with _scratch() as folder, _own_token(), _loopback_only(), _connected(**local, _temp_dir=folder):
                yield


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for Ray's own files, deleted afterwards; those that killed drivers could not delete are deleted first.

    It is directly below /tmp because socket paths end at 107 bytes, and TMPDIR may be deeper than Ray's leave room for.
    Ray opens the folder it is given to everybody, so that lies in one that only its owner may enter.
    """
    for abandoned in glob.glob(f"{_SCRATCH}*/owner"):
        with suppress(OSError), open(abandoned, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the owner lives or is somebody else
            shutil.rmtree(os.path.dirname(abandoned))
    folder = tempfile.mkdtemp(prefix=os.path.basename(_SCRATCH), dir=os.path.dirname(_SCRATCH))
    try:
        with open(os.path.join(folder, "owner"), "wb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            inner = os.path.join(folder, "r")
            os.mkdir(inner)
            yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _connected(**options: Any) -> Iterator[None]:
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the stack of every error that it also raises
    try:
        with _handlers_kept():  # Ray's own end a driver within three seconds, whatever it has to finish
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # its handler's answer to a signal that came meanwhile
            signal.alarm(0)  # with which it would end what is closed and deleted now
            raise StopSignal(signal.SIGTERM) from None
        raise
    finally:
        ray.shutdown()


@contextmanager
def _own_token() -> Iterator[None]:
    """A local cluster asks for a token, and this one lives in the environment of this process and those it starts.

    Without one Ray writes a file to the home directory that everybody can read. It stays for the life of the process,
    because Ray reads it once. The mode is Ray's to set: it was read when Ray was imported, and where the environment
    does not name one, ``ray.init`` switches a local cluster to tokens and says so in the environment.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    before = os.environ.pop("RAY_AUTH_MODE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["RAY_AUTH_MODE"] = before


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A local cluster listens on 127.0.0.1 alone.

    Ray does so where it holds a machine for unable to be part of a cluster, and everywhere else turns a loopback
    address it is given into one that the network reaches.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints a paragraph for every process that ends early, where the driver says one line.

    Displays are not silenced: they keep the stream they were made with.
    """
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


class StopSignal(KeyboardInterrupt):
    """A signal ended what had nothing to finish first. ``status`` is the exit status a shell gives for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@dataclass(slots=True)
class StopRequest:
    """The number of the signal that asked for a stop, 0 if none did."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C ask politely the first time; the second time they end the process."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal:
            raise StopSignal(number)
        request.signal = number

    with _handled(ask):
        yield request


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise StopSignal: the program ends by way of what it has to close and delete."""

    def end(number: int, frame: FrameType | None) -> None:
        raise StopSignal(number)

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    with _handlers_kept():
        for number in _STOPPING:
            signal.signal(number, handler)
        yield


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Handlers are the main thread's to set, Ray's included."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
