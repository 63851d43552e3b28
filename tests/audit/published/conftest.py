"""Tables in the shape of ours, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest


@pytest.fixture
def cell() -> Callable[..., pd.DataFrame]:
    """One row of a cell table; fields may be overridden."""

    def make(**fields: Any) -> pd.DataFrame:
        row = {
            "model": "a folder",
            "layer": 0,
            "metric": "utilization",
            "outcome": "delta_loss",
            "intervention": "zero",
            "scope": "sequence",
            "label": "published",
            "n": 300,
            "cohen_d": 0.1,
            "d_low": 0.0,
            "d_high": 0.2,
            "p_t": 0.08,
            "p_wilcoxon": 0.1,
            "verdict": "undecided",
        }
        return pd.DataFrame([{**row, **fields}])

    return make
