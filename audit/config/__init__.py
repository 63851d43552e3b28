"""The audit specification: one YAML file, typed, with ``--set`` overrides and one clear sentence per mistake."""

from __future__ import annotations

from audit.config.checks import audited_layers, check_against, check_length
from audit.config.mistakes import ConfigError
from audit.config.specification import (
    AuditConfig,
    CalibrationConfig,
    ClusterConfig,
    CorpusConfig,
    DatasetsSource,
    DemoSource,
    EngineConfig,
    InterventionConfig,
    JsonlSource,
    ModelConfig,
    ParquetSource,
    PositionsConfig,
    TextSource,
)

__all__ = [
    "AuditConfig",
    "CalibrationConfig",
    "ClusterConfig",
    "ConfigError",
    "CorpusConfig",
    "DatasetsSource",
    "DemoSource",
    "EngineConfig",
    "InterventionConfig",
    "JsonlSource",
    "ModelConfig",
    "ParquetSource",
    "PositionsConfig",
    "TextSource",
    "audited_layers",
    "check_against",
    "check_length",
]
