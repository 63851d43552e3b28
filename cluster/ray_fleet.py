"""Replicas as Ray actors: one actor of one rank each; the driver owns recovery, Ray restarts and retries nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.cloudpickle
import ray.data
import ray.exceptions

from audit.runfolder import RunFolder
from cluster.committer import TABLES, UnwrittenError
from cluster.replica import Handle, Replica, ReplicaLostError, ReplicaUnreachableError, Result, TaskError
from cluster.tasks import Task
from cluster.worker import Worker

ROWS_PER_FILE = 1_000_000
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# After these the device or the process is not what it was before, though it still answers.
_RECYCLE = ("OutOfMemoryError", "AcceleratorError", "MemoryError")


class _Actor:
    """Holds one worker. What can go wrong on the way to it does so in the first ping: there an error is an answer."""

    def __init__(self, make_worker: bytes) -> None:
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def ping(self) -> None:
        if self._worker is None:
            make_worker: Callable[[], Worker] = ray.cloudpickle.loads(self._make_worker)
            self._worker = make_worker()

    def run(self, task: Task, attempt: int) -> tuple[dict[str, Any] | pa.Table | None, ...]:
        assert self._worker is not None, "a replica gets tasks after its first ping"
        output = self._worker.run(task, attempt)
        receipt = dict(output.receipt) | {
            "rows": {name: table.num_rows for name, table in output.tables.items()},
            "bytes": sum(table.nbytes for table in output.tables.values()),
        }
        return receipt, *(output.tables.get(name) for name in TABLES)


class _RayReplica:
    def __init__(self, name: str, actor: Any, results: dict[Handle, tuple[str, dict[str, Handle]]]) -> None:
        self.name = name
        self._actor = actor
        self._results = results

    def ping(self) -> Handle:
        return self._actor.ping.remote()

    def submit(self, task: Task, attempt: int) -> Handle:
        receipt, *tables = self._actor.run.options(num_returns=1 + len(TABLES), name=task.id).remote(task, attempt)
        self._results[receipt] = (task.id, dict(zip(TABLES, tables, strict=True)))
        return receipt

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class RayFleet:
    """Replicas on the connected Ray cluster, ``cpus`` and ``gpus`` each."""

    def __init__(self, size: int, make_worker: Callable[[], Worker], *, cpus: int = 1, gpus: float = 0) -> None:
        self.size = size
        self._make_worker = ray.cloudpickle.dumps(make_worker)
        self._actor_class = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._results: dict[Handle, tuple[str, dict[str, Handle]]] = {}

    def launch(self, name: str) -> Replica:
        return _RayReplica(name, self._actor_class.remote(self._make_worker), self._results)

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        if not handles:
            time.sleep(seconds)
            return []
        ray.wait(list(handles), timeout=seconds, fetch_local=False)  # for the first; then whatever else is there by now
        done, _ = ray.wait(list(handles), num_returns=len(handles), timeout=0, fetch_local=False)
        return list(done)

    def answer(self, handle: Handle) -> Any:
        held = self._results.pop(handle, None)
        try:
            receipt = ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            raise TaskError(_ANSI.sub("", str(error)), recycle=type(error.cause).__name__ in _RECYCLE) from None
        except ray.exceptions.ActorUnavailableError as error:
            raise ReplicaUnreachableError(_first_line(error)) from None
        except ray.exceptions.RayError as error:
            raise ReplicaLostError(_first_line(error)) from None
        if held is None:
            return receipt
        task, tables = held
        return Result(task, receipt, {name: ref for name, ref in tables.items() if receipt["rows"].get(name)})


def write_tables(refs: Sequence[Handle], folder: RunFolder, target: str) -> None:
    """Write tables that lie in the object store, through a Ray Dataset; raises UnwrittenError."""
    try:
        ray.data.from_arrow_refs(list(refs)).write_parquet(
            folder.path(target),
            filesystem=folder.arrow_filesystem(),
            min_rows_per_file=ROWS_PER_FILE,
            compression="zstd",
        )
    except (ray.exceptions.RayError, OSError) as error:
        raise UnwrittenError(_first_line(error), [ref for ref in refs if _is_lost(ref)]) from error


def _is_lost(ref: Handle) -> bool:
    try:
        ray.get(ref, timeout=30)
    except ray.exceptions.RayError:
        return True
    return False


def _first_line(error: Exception) -> str:
    lines = _ANSI.sub("", str(error)).strip().splitlines()
    detail = next(
        (line.partition("Worker exit detail:")[2].strip() for line in lines if "Worker exit detail:" in line), ""
    )
    return f"{type(error).__name__}: {lines[0] if lines else ''} {detail}".strip()
