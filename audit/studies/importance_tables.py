"""The tables of the importance audit, from what every layer gave: cells with verdicts, pooled lines, controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from audit.statistics.cells import CELL, cell_table
from audit.statistics.pooled import POOLED, LayerPairs, pooled_row, pooled_table
from audit.studies.importance import LayerStudy, Question


def importance_tables(studies: Sequence[LayerStudy], question: Question) -> dict[str, pd.DataFrame]:
    """``cells``, ``pooled``, ``correlations``, ``controls`` and, where asked for, ``contrasts``; docs/tables.md.

    The order of the studies does not matter, to the last bit.
    """
    tables = {
        "cells": cell_table([row for study in studies for row in study.cells], question.settings),
        "pooled": _pooled(studies, question),
        "correlations": _sorted([row for study in studies for row in study.correlations]),
        "controls": _sorted([row for study in studies for row in study.controls]),
    }
    if question.contrasts:
        contrasts = [study.contrasts for study in studies if study.contrasts is not None]
        order = [*CELL, "sequence", "position"]
        tables["contrasts"] = pd.concat(contrasts, ignore_index=True).sort_values(order, ignore_index=True)
    return tables


def _pooled(studies: Sequence[LayerStudy], question: Question) -> pd.DataFrame:
    layers: dict[tuple[Any, ...], dict[int, LayerPairs]] = {}
    keys: dict[tuple[Any, ...], dict[str, Any]] = {}
    for study in studies:
        for key, pairs in study.lines:
            line = tuple(key[name] for name in POOLED)
            layers.setdefault(line, {})[study.cell.layer] = pairs
            keys.setdefault(line, {name: value for name, value in key.items() if name != "layer"})
    return pooled_table(pooled_row(layers[line], keys[line], question.settings) for line in sorted(layers))


def _sorted(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).sort_values(list(CELL), ignore_index=True)
