"""Interventions that change nothing, in the cells of the importance audit: what numerics alone do to an outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from audit.statistics.cells import Pairs, Settings, cell_row
from audit.studies.ends import Floats
from audit.studies.summary import NOISE_QUANTILE

IDENTITY = "identity"


def noise_quantiles(noise: pd.DataFrame, outcomes: Sequence[str]) -> dict[str, float | None]:
    """The 99.9 % quantile of |outcome| over identity rows; None for an outcome that has none, such as gap_norm."""
    found: dict[str, float | None] = {}
    for name in outcomes:
        values = _identity_values(noise, name)
        values = values[np.isfinite(values)]
        found[name] = float(np.quantile(values, NOISE_QUANTILE)) if len(values) else None
    return found


def identity_cells(
    noise: pd.DataFrame, floors: Mapping[str, float | None], cell: Mapping[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    """A cell per outcome that has a floor, |effect| of the identity rows against none; ``cell``: the columns that all
    cells of the layer share.
    """
    rows = []
    for outcome, floor in floors.items():
        values = _identity_values(noise, outcome)
        known = ~np.isnan(values)
        if not known.any():
            continue
        nobody = np.full(int(known.sum()), -1, dtype=np.int64)
        pairs = Pairs(
            high_N=values[known],
            low_N=np.zeros(len(nobody)),
            document_N=noise["document"].to_numpy(np.int64)[known],
            expert_high_N=nobody,
            expert_low_N=nobody,
        )
        key = {**cell, "metric": IDENTITY, "outcome": outcome, "label": IDENTITY, "orientation": 0}
        rows.append(cell_row(pairs, key, settings, noise_floor=floor))
    return rows


def _identity_values(noise: pd.DataFrame, outcome: str) -> Floats:
    """|outcome| of the identity rows; every one without a value nan."""
    if outcome == "gap_norm":  # of an identity: 0 by construction, which says nothing about rounding
        return np.full(len(noise), np.nan)
    column = {"abs_delta_loss": "delta_loss", "logit_drop": "delta_logit"}.get(outcome, outcome)
    return np.abs(noise[column].astype(float).to_numpy(np.float64))
