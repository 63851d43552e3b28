"""One process of a group: it holds a worker, and meets the other ranks where there are any."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pyarrow as pa
import ray
import ray.cloudpickle
import ray.util

from cluster.driver.group import Place
from cluster.tasks import Task
from cluster.worker import TABLES, Output, Worker


class Rank:
    """What can go wrong on the way to a worker does so in :meth:`load`: there an error is an answer."""

    def __init__(self, make_worker: bytes) -> None:
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._store: Any = None  # of rank 0: through it the ranks find each other

    def meet(self) -> str:
        """Open a port at which the other ranks find this one; returns host:port."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415 -- others need no torch

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return f"{host}:{self._store.port}"

    def load(self, place: Place, backend: str, seconds: float) -> None:
        """Make the worker, once; ``seconds``: how long a rank waits for another one."""
        if self._worker is None:
            if backend == "gloo":  # Ray shows all devices to a process that asked for none, and libraries take them
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            if place.ranks > 1:
                self._join(place, backend, timedelta(seconds=seconds))
            make_worker: Callable[[Place], Worker] = ray.cloudpickle.loads(self._make_worker)
            self._worker = make_worker(place)

    def ping(self) -> None:
        pass

    def run(self, task: Task, attempt: int) -> tuple[Mapping[str, Any] | pa.Table | None, ...]:
        """The receipt, and the tables, which stay on this node."""
        output = self._output(task, attempt)
        receipt = dict(output.receipt) | {
            "rows": _rows(output),
            "bytes": sum(table.nbytes for table in output.tables.values()),
        }
        return receipt, *(output.tables.get(name) for name in TABLES)

    def serve(self) -> None:
        """Take part in the tasks of the other ranks, without one of its own."""
        assert self._worker is not None
        self._worker.serve()

    def follow(self, task: Task, attempt: int) -> dict[str, int]:
        """Take part in the task that rank 0 answers for; returns the rows that this rank would have written."""
        return _rows(self._output(task, attempt))

    def _output(self, task: Task, attempt: int) -> Output:
        assert self._worker is not None, "a rank gets tasks after it has loaded"
        return self._worker.run(task, attempt)

    def _join(self, place: Place, backend: str, timeout: timedelta) -> None:
        from torch.distributed import TCPStore, init_process_group  # type: ignore[attr-defined]  # noqa: PLC0415

        host, _, port = place.address.rpartition(":")
        # What libraries that find their ranks themselves look for.
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.ranks), LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
        store = self._store or TCPStore(host, int(port), is_master=False, timeout=timeout)
        init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=timeout)


def _rows(output: Output) -> dict[str, int]:
    return {name: table.num_rows for name, table in output.tables.items()}
