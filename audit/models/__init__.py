"""Models: load a checkpoint, find its MoE layers, take over their seams."""

from __future__ import annotations

from audit.models.description import ModelDescription
from audit.models.discovery import ModelError
from audit.models.loading import load_model, prepare
from audit.models.moe_model import MoEModel
from audit.models.outline import describe

__all__ = ["MoEModel", "ModelDescription", "ModelError", "describe", "load_model", "prepare"]
