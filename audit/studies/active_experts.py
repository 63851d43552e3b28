"""One layer's effects as arrays: a row per audited token, a column per active expert.

Shapes: N tokens, K active experts at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# All say the more the higher; that is why the logit of the true token is given as its drop, -delta_logit.
OUTCOMES = ("delta_loss", "abs_delta_loss", "kl", "js", "tv", "top1_flip", "logit_drop", "gap_norm")
NEED_NEXT_TOKEN = ("delta_loss", "abs_delta_loss", "logit_drop")
PREDICTORS = ("routing_weight", "contribution_norm", "attribution", "abs_attribution")
COLUMNS = (
    "document", "sequence", "position", "expert", "draw", "routing_weight", "contribution_norm", "attribution",
    "delta_loss", "kl", "js", "tv", "top1_flip", "delta_logit", "gap_norm",
)  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActiveExperts:
    """Tokens in the order of (sequence, position), their experts in the order of ids.

    ``expert_NK`` is -1, and every value nan, where fewer than K effects of a token were measured. Values are nan where
    the effect table has null.
    """

    document_N: NDArray[np.int64]
    sequence_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    expert_NK: NDArray[np.int64]
    predictors: Mapping[str, Floats]
    outcomes: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.document_N)

    def scores(self, value_E: Floats) -> Floats:
        """A metric's values [N, K] of the active experts."""
        return np.where(self.expert_NK >= 0, value_E[self.expert_NK], np.nan)

    def defined_N(self, outcome: str) -> NDArray[np.bool_]:
        """Tokens at which the outcome exists: a loss needs a next token.

        Where kl has no value either, which needs none, something went wrong that must not pass for a missing token.
        """
        if outcome not in NEED_NEXT_TOKEN:
            return np.ones(len(self), dtype=bool)
        found_NK, kl_NK = ~np.isnan(self.outcomes[outcome]), ~np.isnan(self.outcomes["kl"])
        defined_N: NDArray[np.bool_] = np.logical_or(found_NK.any(axis=1), ~kl_NK.any(axis=1))
        return defined_N


def active_experts(rows: pd.DataFrame) -> ActiveExperts:
    """The rows of one layer, intervention and scope whose unit is one expert; columns as ``COLUMNS``.

    Several draws of ``resample`` for one expert are averaged.
    """
    keys = ["sequence", "position", "expert"]
    rows = rows.assign(top1_flip=rows["top1_flip"].astype(float), abs_delta_loss=rows["delta_loss"].abs())
    rows = rows.assign(abs_attribution=rows["attribution"].abs(), logit_drop=-rows["delta_logit"])
    if rows["draw"].notna().any():
        # A draw without a value leaves the expert without one: it must not drop out of the mean unseen.
        rows = rows.groupby([*keys, "document"], as_index=False, sort=False).mean(numeric_only=True, skipna=False)
    rows = rows.sort_values(keys, kind="stable", ignore_index=True)
    first = ~rows.duplicated(["sequence", "position"]).to_numpy()
    token = np.cumsum(first) - 1
    column = np.arange(len(rows)) - np.flatnonzero(first)[token]
    shape = (int(first.sum()), int(column.max()) + 1 if len(rows) else 0)

    def spread(name: str) -> Floats:
        values = np.full(shape, np.nan)
        values[token, column] = rows[name].to_numpy(np.float64)
        return values

    expert = np.full(shape, -1, dtype=np.int64)
    expert[token, column] = rows["expert"].to_numpy(np.int64)
    named = {name: rows[name].to_numpy(np.int64)[first] for name in ("document", "sequence", "position")}
    return ActiveExperts(
        document_N=named["document"],
        sequence_N=named["sequence"],
        position_N=named["position"],
        expert_NK=expert,
        predictors={name: spread(name) for name in PREDICTORS},
        outcomes={name: spread(name) for name in OUTCOMES},
    )
