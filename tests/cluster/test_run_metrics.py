"""The series as Prometheus reads them from a real Ray's port, and nothing at all where nobody gathers them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from measured_driver import FIRST, FLOOR, SEPARATOR

from cluster import metrics

_LINE = re.compile(r"ray_(?P<name>moe_audit_\w+)\{(?P<labels>.*)\} (?P<value>\S+)$")
# Ray's own, on every series.
_OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}


def test_every_series_is_served_with_its_value() -> None:
    driver = Path(__file__).with_name("measured_driver.py")
    gathering = {"RAY_enable_metrics_collection": "1", "RAY_metrics_report_interval_ms": "1000"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | gathering | {"PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)
    page = subprocess.run(
        [sys.executable, driver], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    ).stdout
    first, last = (_series(part) for part in page.split(SEPARATOR))
    expected = {
        ("rows_per_second", "effects"): 123.5,
        ("tasks", "observe", "waiting"): 1,
        ("tasks", "effects", "waiting"): 11,
        **{("tasks", stage, "running"): 2 for stage in ("observe", "effects")},
        **{("tasks", stage, "answered"): 3 for stage in ("observe", "effects")},
        **{("tasks", stage, "committed"): 4 for stage in ("observe", "effects")},
        **{("tasks", stage, "quarantined"): 5 for stage in ("observe", "effects")},
        ("groups", "ready"): 6,
        ("groups", "starting"): 7,
        ("groups", "waiting"): 8,
        ("group_seconds_left",): 80.25,
        ("losses",): 10,
        ("noise_floor", "kl"): 2e-12,  # of two layers; js has none
    }
    first.pop(("rows_per_second", "observe"), None)  # may still be there
    assert first == expected
    assert last == expected  # that stage is over


def _series(page: str) -> dict[tuple[str, ...], float]:
    """(name, values of our labels) of every series of a page."""
    served = {}
    for line in page.splitlines():
        if found := _LINE.fullmatch(line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found["labels"]))
            own = [v for k, v in sorted(labels.items()) if k not in _OF_RAY and not k.startswith("otel_")]
            served[(found["name"].removeprefix("moe_audit_"), *own)] = float(found["value"])
    return served


def test_the_series_are_those_of_the_documentation() -> None:
    text = Path(__file__).parents[2].joinpath("docs/cluster.md").read_text()
    documented = re.findall(r"(?m)^\| `ray_(moe_audit_\w+)`", text)
    assert documented == list(metrics.SERIES)


@pytest.mark.parametrize(("connected", "switch"), [(False, "1"), (True, "0"), (True, "false")])
def test_nothing_is_made_where_nobody_gathers(monkeypatch: pytest.MonkeyPatch, connected: bool, switch: str) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a series is made")

    monkeypatch.setattr(ray, "is_initialized", lambda: connected)
    monkeypatch.setattr(metrics, "Gauge", refuse)
    monkeypatch.setenv("RAY_enable_metrics_collection", switch)
    with metrics.Metrics() as silent:
        silent.record(FIRST)
        silent.noise_floor(FLOOR)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.delenv("RAY_enable_metrics_collection")
    with pytest.raises(AssertionError, match="a series is made"):
        metrics.Metrics()
