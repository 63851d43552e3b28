"""The tables of the importance audit, from what every candidate gave at every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from audit.statistics.cells import CELL, cell_table
from audit.statistics.pooled import POOLED, LayerPairs, pooled_row, pooled_table
from audit.studies.importance import CandidateStudy, Question

CONTRASTS = (*CELL, "sequence", "position")  # what the table of contrasts is sorted by


def importance_tables(studies: Iterable[CandidateStudy], question: Question) -> dict[str, pd.DataFrame]:
    """``cells``, ``pooled``, ``correlations``, ``controls`` and, where asked for, ``contrasts``; docs/tables.md.

    The order of the studies does not matter, to the last bit. All their pairs are held in memory.
    """
    studies = list(studies)
    cells, *others = row_tables(studies, question).items()
    tables = dict([cells, ("pooled", pooled_table(_pooled_rows(studies, question))), *others])
    if question.contrasts:
        contrasts = [table for study in studies for table in study.contrasts]
        tables["contrasts"] = pd.concat(contrasts, ignore_index=True).sort_values([*CONTRASTS], ignore_index=True)
    return tables


def row_tables(studies: Sequence[CandidateStudy], question: Question) -> dict[str, pd.DataFrame]:
    """The tables that need no pairs: ``cells``, ``correlations`` and ``controls``."""
    return {
        "cells": cell_table([row for study in studies for row in study.cells], question.settings),
        "correlations": _sorted([row for study in studies for row in study.correlations]),
        "controls": _sorted([row for study in studies for row in study.controls]),
    }


def pooled_key(key: dict[str, Any]) -> dict[str, Any]:
    """What the lines of all layers share of the key of one layer's cell."""
    return {name: value for name, value in key.items() if name != "layer"}


def _pooled_rows(studies: Sequence[CandidateStudy], question: Question) -> list[dict[str, Any]]:
    layers: dict[tuple[Any, ...], dict[int, LayerPairs]] = {}
    keys: dict[tuple[Any, ...], dict[str, Any]] = {}
    for study in studies:
        for key, pairs in study.lines:
            line = tuple(key[name] for name in POOLED)
            layers.setdefault(line, {})[study.cell.layer] = pairs
            keys.setdefault(line, pooled_key(key))
    return [pooled_row(layers[line], keys[line], question.settings) for line in sorted(layers)]


def _sorted(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).sort_values(list(CELL), ignore_index=True)
