"""Models: load a checkpoint, find its MoE layers, take over their seams."""

from __future__ import annotations

from audit.models.discovery import ModelError
from audit.models.loading import ModelDescription, MoEModel, describe, load_model, prepare

__all__ = ["MoEModel", "ModelDescription", "ModelError", "describe", "load_model", "prepare"]
