"""What is observed of the experts without intervening, and the metrics computed from it (rung 1 of the audit)."""

from __future__ import annotations

from audit.observations.accumulate import Observations
from audit.observations.registry import (
    ALIASES,
    METRICS,
    Metric,
    coactivation,
    find_metric,
    metrics,
    super_experts,
    unified,
)
from audit.observations.reservoir import Reservoir
from audit.observations.sums import LayerSums
from audit.observations.table import OBSERVATIONS
from audit.observations.weights import weight_statistics

__all__ = [
    "ALIASES",
    "METRICS",
    "OBSERVATIONS",
    "LayerSums",
    "Metric",
    "Observations",
    "Reservoir",
    "coactivation",
    "find_metric",
    "metrics",
    "super_experts",
    "unified",
    "weight_statistics",
]
