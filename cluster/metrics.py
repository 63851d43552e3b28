"""How a run is doing, as series that Prometheus can collect from Ray's metrics port (docs/cluster.md lists them).

Labels are few and small: the stage, the state, the outcome; never a task or a layer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.metrics import Gauge

from cluster.display import Status

# Series and what each is: the text Prometheus shows, and its labels. Ray puts ``ray_`` before the name.
SERIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "moe_audit_rows_per_second": ("Rows written per second of work; effects in the stage of that name", ("stage",)),
    "moe_audit_tasks": ("Tasks by state", ("stage", "state")),
    "moe_audit_groups": ("Groups by state", ("state",)),
    "moe_audit_group_seconds_left": ("Predicted seconds that one group alone would need for the rest", ()),
    "moe_audit_losses": ("Groups lost since the driver began", ()),
    "moe_audit_noise_floor": ("Largest 99.9 % quantile over layers of what numerics alone do", ("outcome",)),
}
_SWITCH = "RAY_enable_metrics_collection"
_AGAIN_SECONDS = 1.0  # Ray's interval is a second at least, ten by default
_TASKS = ("waiting", "running", "answered", "committed", "quarantined")


def _collected() -> bool:
    """Whether anybody gathers metrics: ``cluster.session`` starts its own clusters without, unless told otherwise."""
    return ray.is_initialized() and os.environ.get(_SWITCH, "1").lower() not in ("0", "false")


class Metrics:
    """Sets the series above, from where it is made until it is closed; does nothing where no metrics are gathered.

    Ray forgets a value that is not set again within two of its intervals, so a thread sets all of them again and again:
    a stage without news and the reduction would have none.
    """

    def __init__(self) -> None:
        self._gauges = {name: Gauge(name, *about) for name, about in SERIES.items()} if _collected() else {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._stage = ""
        if self._gauges:
            threading.Thread(target=self._keep, name="metrics", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is set from here on. Call it before Ray is disconnected."""
        with self._lock:
            self._closed.set()

    def record(self, status: Status) -> None:
        """Tell the series where the run is; cheap enough for every report of the driver."""
        if self._stage != status.stage:
            with self._lock:  # the last rate of a stage that is over would stand for ever
                self._values.pop(("moe_audit_rows_per_second", (("stage", self._stage),)), None)
            self._stage = status.stage
        self._set("moe_audit_rows_per_second", status.rows_per_second or 0.0, stage=status.stage)
        for state in _TASKS:
            self._set("moe_audit_tasks", getattr(status, state), stage=status.stage, state=state)
        groups = {"ready": status.groups_ready, "starting": status.groups_starting, "waiting": status.groups_waiting}
        for state, count in groups.items():
            self._set("moe_audit_groups", count, state=state)
        self._set("moe_audit_group_seconds_left", status.group_seconds_left)
        self._set("moe_audit_losses", status.losses)

    def noise_floor(self, floor: pa.Table) -> None:
        """``floor``: results/noise_floor.parquet, once it is known."""
        for outcome in pc.unique(floor["outcome"]).to_pylist():
            largest = pc.max(floor.filter(pc.field("outcome") == outcome)["quantile_999"]).as_py()
            if largest is not None:
                self._set("moe_audit_noise_floor", largest, outcome=outcome)

    def _set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            if self._gauges and not self._closed.is_set():
                self._values[name, tuple(labels.items())] = value
                self._gauges[name].set(value, labels)

    def _keep(self) -> None:
        while not self._closed.wait(_AGAIN_SECONDS):
            with self._lock:
                if not self._closed.is_set():
                    for (name, labels), value in self._values.items():
                        self._gauges[name].set(value, dict(labels))
