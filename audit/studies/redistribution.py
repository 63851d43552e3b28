"""Redistribution: do a token's other experts say what the removed one said (arXiv 2606.10703)?

Removing an expert leaves a gap, y - y', beside a remainder, y'. Where both point the same way the remaining experts
carry some of it already: the relative compensation is ||y'|| max(cos(gap, y'), 0) / ||gap||, with y of the routed
experts alone and with the shared experts' output in it. Rows are effects of ``zero`` on single experts.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from audit.statistics.bootstrap import mean_interval

NOT_MEASURED = "not measured; ask the engine for redistribution"
NO_SHARED = "the layer has no shared experts"
NO_VALUE = "every gap or remainder is zero"

_COLUMNS = (
    "document", "layer", "expert", "routing_weight", "gap_norm",
    "remainder_norm", "gap_cosine", "remainder_norm_shared", "gap_cosine_shared",
)  # fmt: skip
_QUANTITIES = (
    "gap_norm", "gap_cosine", "relative_compensation", "gap_cosine_shared", "relative_compensation_shared",
)  # fmt: skip
_EXACT_BELOW = 8  # values of a rank correlation whose p is counted over all orders; more, by Student's t


def redistribution_layers(
    effects: pa.Table | pd.DataFrame, *, scope: str = "token", level: float = 0.95, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """A row per layer and quantity: ``gap_norm`` in units of the residual stream, ``gap_cosine`` and
    ``relative_compensation`` of the routed experts alone and, as ``..._shared``, with the shared ones.

    ``mean`` and ``median`` over ``n`` rows of ``documents`` documents, ``low`` and ``high`` of the mean by a bootstrap
    over documents at ``level``; ``undefined`` rows have no value because a vector is zero. NaN only with a ``reason``.
    """
    rows = _single_experts(effects, scope)
    found: list[dict[str, object]] = []
    for layer, frame in rows.groupby("layer", sort=True):
        for quantity in _QUANTITIES:
            value_N = frame[quantity].to_numpy(np.float64)
            used_N = np.isfinite(value_N)
            reason = "" if used_N.any() else _why_missing(frame, quantity)
            row: dict[str, object] = {
                "layer": layer,
                "quantity": quantity,
                "n": int(used_N.sum()),
                "documents": int(frame.loc[used_N, "document"].nunique()),
                "undefined": 0 if reason in (NOT_MEASURED, NO_SHARED) else int((~used_N).sum()),
            }
            if reason:
                row |= {"mean": math.nan, "low": math.nan, "high": math.nan, "median": math.nan, "reason": reason}
            else:
                document_N = frame.loc[used_N, "document"].to_numpy(np.int64)
                interval = mean_interval(value_N[used_N], document_N, level=level, draws=draws, seed=seed)
                row |= {
                    "mean": float(value_N[used_N].mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "median": float(np.median(value_N[used_N])),
                    "reason": interval.reason,
                }
            found.append(row)
    return pd.DataFrame(found)


def depth_profile(layers: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of layer depth with the layers' mean and median gap norm, from :func:`redistribution_layers`.

    A row per ``statistic``: ``n`` layers, ``rho``, two-sided ``p``; NaN only with a ``reason``.
    """
    gaps = layers[layers["quantity"] == "gap_norm"]
    return pd.DataFrame(
        {"statistic": name, **_spearman(gaps["layer"].to_numpy(np.float64), gaps[name].to_numpy(np.float64), "layers")}
        for name in ("mean", "median")
    )


def weight_and_gap(effects: pa.Table | pd.DataFrame, *, scope: str = "token") -> pd.DataFrame:
    """Spearman's rho, per layer, of the experts' mean routing weight with their mean gap norm.

    A row per ``layer``: ``n`` experts with effects, ``rho``, two-sided ``p``; NaN only with a ``reason``.
    """
    means = _single_experts(effects, scope).groupby(["layer", "expert"])[["routing_weight", "gap_norm"]].mean()
    return pd.DataFrame(
        {"layer": layer, **_spearman(rows["routing_weight"].to_numpy(), rows["gap_norm"].to_numpy(), "experts")}
        for layer, rows in means.groupby("layer", sort=True)
    )


def _single_experts(effects: pa.Table | pd.DataFrame, scope: str) -> pd.DataFrame:
    """The rows of ``zero`` on single experts where they are active, with both relative compensations.

    Raises ValueError where there are none.
    """
    wanted = {"unit": "expert", "intervention": "zero", "scope": scope}
    if isinstance(effects, pa.Table):
        frame: pd.DataFrame
        chosen = pa.array(np.ones(len(effects), dtype=bool))
        for name, word in wanted.items():
            chosen = pc.and_(chosen, pc.equal(pc.cast(effects[name], pa.string()), word))
        frame = effects.filter(chosen).select([*_COLUMNS, "slot"]).to_pandas()
    else:
        chosen_N = np.logical_and.reduce([effects[name].astype("string") == word for name, word in wanted.items()])
        frame = effects.loc[chosen_N, [*_COLUMNS, "slot"]]
    frame = frame[frame["slot"].notna()].astype(dict.fromkeys(_COLUMNS[3:], np.float64))
    if not len(frame):
        raise ValueError(
            f"effects: no rows of zero on single experts in scope {scope!r}; measure zero with target each"
        )
    for suffix in ("", "_shared"):
        frame[f"relative_compensation{suffix}"] = _relative_compensation(
            frame["gap_norm"], frame[f"remainder_norm{suffix}"], frame[f"gap_cosine{suffix}"]
        )
    return frame


def _relative_compensation(gap: pd.Series, remainder: pd.Series, cosine: pd.Series) -> pd.Series:
    # Where nothing remains there is no cosine, and nothing compensates; where nothing went, nothing could be.
    along = remainder * cosine.clip(lower=0.0)
    return along.mask(remainder == 0.0, 0.0) / gap.where(gap > 0.0)


def _why_missing(frame: pd.DataFrame, quantity: str) -> str:
    if quantity != "gap_norm" and frame["remainder_norm"].isna().all():
        return NOT_MEASURED
    if quantity.endswith("_shared") and frame["remainder_norm_shared"].isna().all():
        return NO_SHARED
    return NO_VALUE


def _spearman(a_N: NDArray[np.float64], b_N: NDArray[np.float64], what: str) -> dict[str, object]:
    found: dict[str, object] = {"n": len(a_N), "rho": math.nan, "p": math.nan, "reason": ""}
    if len(a_N) < 3:
        return found | {"reason": f"{len(a_N)} {what}; a rank correlation needs at least 3"}
    if np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return found | {"reason": f"all {what} have the same value"}
    rho, p = stats.spearmanr(a_N, b_N)
    return found | {"rho": float(rho), "p": _exact_p(a_N, b_N) if len(a_N) < _EXACT_BELOW else float(p)}


def _exact_p(a_N: NDArray[np.float64], b_N: NDArray[np.float64]) -> float:
    """Share of all orders of ``b_N`` that correlate at least as strongly, either way."""
    rank_a, rank_b = stats.rankdata(a_N), stats.rankdata(b_N)
    rank_a, rank_b = rank_a - rank_a.mean(), rank_b - rank_b.mean()
    orders = np.array(list(permutations(range(len(rank_b)))))
    products = np.abs(rank_b[orders] @ rank_a)
    return float(np.mean(products >= abs(rank_b @ rank_a) - 1e-9))
