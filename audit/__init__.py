"""moe-audit as a library: load a model, intervene on its experts, read the effects. Needs no cluster.

>>> import audit
>>> model = audit.load("demo")
>>> effects = audit.measure(model, "def double(x):\\n    return 2 * x\\n", layers=[2])
>>> effects.to_pandas()[["position", "expert", "kl", "delta_loss"]]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audit.calibration import Calibration
    from audit.engine import Engine, Measurement
    from audit.engine.validate import load, validate
    from audit.interventions import Intervention, Target
    from audit.models import ModelDescription, ModelError, MoEModel, describe, prepare
    from audit.notebook import calibrate, measure, sequences

# Where each name lives. Loaded at first use: reading a specification or a result table should not load torch.
_HOMES = {
    "Calibration": "audit.calibration",
    "Engine": "audit.engine",
    "Intervention": "audit.interventions",
    "Measurement": "audit.engine",
    "MoEModel": "audit.models",
    "ModelDescription": "audit.models",
    "ModelError": "audit.models",
    "Target": "audit.interventions",
    "calibrate": "audit.notebook",
    "describe": "audit.models",
    "measure": "audit.notebook",
    "load": "audit.engine.validate",
    "prepare": "audit.models",
    "sequences": "audit.notebook",
    "validate": "audit.engine.validate",
}

__all__ = [
    "Calibration",
    "Engine",
    "Intervention",
    "Measurement",
    "MoEModel",
    "ModelDescription",
    "ModelError",
    "Target",
    "calibrate",
    "describe",
    "load",
    "measure",
    "prepare",
    "sequences",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'audit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
