"""Pruning: which experts a criterion removes, what the model loses, and a checkpoint without them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audit.pruning.checkpoint import PrunedCheckpoint, prune_by_metric, write_pruned
    from audit.pruning.limits import RouterLimits, limits_of, model_limits
    from audit.pruning.plan import Pruning, RemovalOrders, plan_prunings
    from audit.pruning.schema import PRUNING
    from audit.pruning.simulation import PrunedForward
    from audit.pruning.table import prune_table

# Loaded at first use, as in ``audit``: a plan and a pruning table are read without loading torch.
_HOMES = {
    "PRUNING": "schema",
    "PrunedCheckpoint": "checkpoint",
    "PrunedForward": "simulation",
    "Pruning": "plan",
    "RemovalOrders": "plan",
    "RouterLimits": "limits",
    "limits_of": "limits",
    "model_limits": "limits",
    "plan_prunings": "plan",
    "prune_by_metric": "checkpoint",
    "prune_table": "table",
    "write_pruned": "checkpoint",
}

__all__ = [
    "PRUNING",
    "PrunedCheckpoint",
    "PrunedForward",
    "Pruning",
    "RemovalOrders",
    "RouterLimits",
    "limits_of",
    "model_limits",
    "plan_prunings",
    "prune_by_metric",
    "prune_table",
    "write_pruned",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'audit.pruning' has no attribute {name!r}")
    return getattr(import_module(f"audit.pruning.{_HOMES[name]}"), name)
