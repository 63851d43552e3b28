"""The engine: exact effects of interventions on experts, by the sweep where the model allows it."""

from __future__ import annotations

from audit.engine.cost import Cost
from audit.engine.engine import Engine, Measurement

__all__ = ["Cost", "Engine", "Measurement"]
