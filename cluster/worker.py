"""The seam between cluster and audit: a worker loads the model and turns one task into tables.

A replica holds one; tests hold one without Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from cluster.tasks import Task


@dataclass(frozen=True, slots=True)
class Output:
    """``tables``: effects and tokens (measure), pruning (prune). ``receipt``: what the manifest remembers, JSON only.

    Of observe and merge the receipt names "folder", where the observations were saved, relative to the run folder.
    """

    receipt: Mapping[str, Any]
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


class Worker(Protocol):
    def run(self, task: Task, attempt: int) -> Output:
        """Runs again with the same result to the last bit; leaves nothing behind that a second run would trip over."""
