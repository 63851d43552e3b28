"""Peak memory of a piece of work: of its own process, and of the Ray workers that it started."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
T = TypeVar("T")
MIB = 1 << 20
_PAUSE_SECONDS = 0.2  # between two looks


def peak_resident() -> int:
    """Most bytes this process was ever resident with, on Linux. ``ru_maxrss`` will not do: a process begins with that
    of the one that started it.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


@dataclass(slots=True)
class Peak:
    """Resident bytes. ``worker``: of the largest Ray worker; ``workers``: of all of them at one time. Pages that
    processes share, such as those of the object store, count in each.
    """

    driver: int = 0
    worker: int = 0
    workers: int = 0

    def __str__(self) -> str:
        each = f"driver {self.driver / MIB:,.0f} MiB"
        if self.workers:
            each += f", largest worker {self.worker / MIB:,.0f} MiB, workers together {self.workers / MIB:,.0f} MiB"
        return each


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Within the block memory is looked at every 0.2 seconds; the peak is what was largest so far."""
    found, over, this = Peak(), threading.Event(), psutil.Process()

    def look() -> None:
        while not over.wait(_PAUSE_SECONDS):
            sizes = [size for child in this.children(recursive=True) if (size := _worker_bytes(child))]
            found.driver = max(found.driver, this.memory_info().rss)
            found.worker = max([found.worker, *sizes])
            found.workers = max(found.workers, sum(sizes))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _worker_bytes(process: psutil.Process) -> int:
    """Resident bytes of a Ray worker that does something; 0 of any other process."""
    with suppress(psutil.Error):
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
            return int(process.memory_info().rss)
    return 0


def isolated(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``function`` in a process of its own, which begins with nothing in memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
