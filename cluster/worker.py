"""The seam between cluster and audit: a worker loads the model and turns one task into tables.

A group holds one; tests hold one without Ray.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from audit.runfolder import SCHEMAS, RunFolder
from audit.storage import StorageError
from cluster.driver.group import Place
from cluster.tasks import Task

TABLES = tuple(SCHEMAS)  # what an output may hold


@dataclass(frozen=True, slots=True)
class Output:
    """``tables``: effects and tokens (measure), pruning (prune). ``receipt``: what the manifest remembers, JSON only.

    Of observe and merge the receipt names "folder", where the observations were saved, relative to the run folder.
    """

    receipt: Mapping[str, Any]
    tables: Mapping[str, pa.Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Here it is the fault of one task; in a commit it would spoil those of others.
        for name, schema in SCHEMAS.items():
            found = self.tables[name].schema if name in self.tables else schema
            if not found.equals(schema):
                other = sorted({column.name for column in {*found} ^ {*schema}})
                raise ValueError(f"the {name} table is not of its schema, in columns or order: {', '.join(other)}")


class Worker(Protocol):
    def serve(self) -> None:
        """Take part in what the other ranks of a group do, each its own task, while this one has none."""

    def run(self, task: Task, attempt: int) -> Output:
        """Runs again with the same result to the last bit; leaves nothing behind that a second run would trip over."""


def make_worker(make: Callable[[str, Place], Worker], url: str, place: Place) -> Worker:
    """The worker of one rank, in its process. Raises StorageError where its machine does not see the run folder."""
    if not RunFolder(url).holds_run():
        raise StorageError(
            f"{url} is not seen by the machine {platform.node()}; name a folder that all machines share, or a URL such "
            "as s3://bucket/run1"
        )
    return make(url, place)
