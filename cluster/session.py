"""A connection to Ray: a cluster of our own on this machine, or the one RAY_ADDRESS names; and stop signals."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FrameType


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ray_session(replicas: int, cpus_per_replica: int) -> Iterator[None]:
    """Within the block Ray is connected; a connection this process already has is used as it is.

    Otherwise RAY_ADDRESS names the cluster to join, and without it one of our own is started, which writes nothing to the home directory, leaves
    nothing behind and declares one logical CPU more than the replicas take: Ray Data needs a free one to write results, and waits for ever otherwise.
    """
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if not joins:
        _use_own_token()
    with _quiet():
        import ray
        import ray.data

        if ray.is_initialized():
            yield
            return
        # AF_UNIX paths end at 107 bytes; pytest's and users' own temporary folders may be too deep for Ray's sockets.
        scratch = None if joins else tempfile.mkdtemp(prefix="r", dir="/tmp" if os.path.isdir("/tmp") else None)
        local = {} if joins else {"num_cpus": max(cores(), replicas * cpus_per_replica) + 1, "include_dashboard": False, "_temp_dir": scratch}
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(address=None if joins else "local", logging_level=logging.ERROR, log_to_driver=False, **local)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield
        finally:
            ray.shutdown()
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)


def _use_own_token() -> None:
    """Ray's local clusters ask for a token by default; this one lives in the environment of this process and those it starts.

    Without it Ray writes one to the home directory. It is kept for the life of the process, because Ray reads it once.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints a paragraph for every process that ends early; the driver says the same in one line. Displays keep the stream they were made with."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
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
