"""A driver on a Ray cluster that gathers metrics: records two stages and prints what the metrics port serves, twice."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import replace

import pyarrow as pa
import ray

from cluster.display import Status
from cluster.metrics import SERIES, Metrics
from cluster.session import ray_session

FIRST = Status(
    stage="observe",
    tasks=15,
    waiting=1,
    running=2,
    answered=3,
    committed=4,
    quarantined=5,
    share=0.5,
    rows=1000,
    rows_per_second=5.5,
    seconds_left=4.0,
    group_seconds_left=90.5,
    groups_ready=6,
    groups_starting=7,
    groups_waiting=8,
    losses=9,
)
SECOND = replace(FIRST, stage="effects", waiting=11, rows_per_second=123.5, group_seconds_left=80.25, losses=10)
SEPARATOR = "# five seconds later"
FLOOR = pa.table({"outcome": ["kl", "kl", "js"], "layer": [0, 1, 0], "quantile_999": [1e-12, 2e-12, None]})


def main() -> None:
    with ray_session(cpus=1), Metrics() as metrics:
        metrics.record(FIRST)
        metrics.record(SECOND)
        metrics.noise_floor(FLOOR)
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        first = _page(url)
        time.sleep(5)  # Ray, told to report every second, forgets after two what is not set again
        last = _page(url)
    print(f"{first}\n{SEPARATOR}\n{last}")


def _page(url: str) -> str:
    """What is served once every series is, or after a minute."""
    text, until = "", time.monotonic() + 60
    while time.monotonic() < until and not all(f"ray_{name}{{" in text for name in SERIES):
        time.sleep(0.3)
        try:
            with urllib.request.urlopen(url, timeout=10) as page:
                text = page.read().decode()
        except OSError:
            continue
    return text


if __name__ == "__main__":
    main()
