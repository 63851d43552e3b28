"""The table of cells: corrections within families, power, equivalence and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.statistics import multiple
from audit.statistics.cell import CELL, COUNTS, INTERVALS, KEY, Pairs, Settings, cell_row
from audit.statistics.effect_size import detectable_d, exact_interval, needed_n
from audit.statistics.verdict import Bounds, Evidence, Rule, practically_null, verdict

__all__ = ["CELL", "COLUMNS", "CONTROLS", "FAMILY", "KEY", "Pairs", "Settings", "cell_row", "cell_table"]

FAMILY = ("model", "outcome", "intervention", "scope", "label")
CONTROLS = ("control", "identity")  # labels of cells that test the audit, not a metric
CORRECTED = ("p_t", "p_t_cluster", "p_wilcoxon", "p_permutation")

_CORRECTIONS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "bonferroni": multiple.bonferroni,
    "holm": multiple.holm,
    "bh": multiple.benjamini_hochberg,
}
_JUDGED = (
    *("dual_test", "equivalence", "equivalence_low", "equivalence_high", "equivalence_uncorrected"),
    *("mde_80", "n_needed_80", "n_to_decide", "verdict", "reason", "notes"),
)
COLUMNS = (
    *KEY,
    *COUNTS,
    *("mean_diff", "median_diff", "sd_diff", "median_abs_effect", "noise_floor", "share_positive"),
    *("superiority", *INTERVALS[:4], "p_superiority", "cohen_d", *INTERVALS[4:]),
    *("p_t", "p_t_cluster", "p_wilcoxon", "p_sign", "p_permutation", "family_size", "alpha_corrected"),
    *(f"{test}_{correction}" for test in CORRECTED for correction in _CORRECTIONS),
    "p_holm_confirmatory",
    *_JUDGED,
)
_TYPES = (
    dict.fromkeys(("layer", "orientation", *COUNTS), "int64")
    | dict.fromkeys(("family_size", "n_needed_80", "n_to_decide"), "Int64")
    | dict.fromkeys(("dual_test", "equivalence", "equivalence_uncorrected"), "boolean")
    | dict.fromkeys((*FAMILY, "metric", "verdict", "reason", "notes"), "str")
)


def cell_table(rows: Iterable[Mapping[str, Any]], settings: Settings) -> pd.DataFrame:
    """The rows of :func:`cell_row` with corrections within families, power and verdicts; columns ``COLUMNS``.

    A family: same model, outcome, intervention, scope and label; cells without a p_t are not counted in it. Rows are
    sorted by ``KEY``; further columns that a caller added to its rows stand last, by name. Raises ValueError where a
    cell occurs twice.
    """
    known = list(rows)
    others = sorted({name for row in known for name in row} - set(COLUMNS))
    frame = pd.DataFrame(known, columns=[*COLUMNS, *others])
    twice = frame[frame.duplicated([*CELL])]
    if len(twice):
        raise ValueError(
            f"rows: the cell {tuple(twice[[*CELL]].to_dict('split')['data'][0])} occurs twice; it is tested once"
        )
    frame = frame.sort_values(list(KEY), ignore_index=True)
    numbers = [name for name in COLUMNS if name not in _TYPES]
    frame[numbers] = frame[numbers].astype("float64")
    for family in frame.groupby(list(FAMILY)).indices.values():
        tested = frame["p_t"].iloc[family].notna().to_numpy()  # the others can read nothing but not estimable
        size = int(tested.sum())
        frame.loc[family, "family_size"] = size
        frame.loc[family, "alpha_corrected"] = settings.alpha / size if size else math.nan
        for test in CORRECTED:
            p = np.where(tested, frame[test].iloc[family].to_numpy(dtype=np.float64), math.nan)
            for correction, correct in _CORRECTIONS.items():
                frame.loc[family, f"{test}_{correction}"] = correct(p)
    confirmatory = frame["outcome"].isin(settings.confirmatory) & ~frame["label"].isin(CONTROLS)
    frame.loc[confirmatory, "p_holm_confirmatory"] = multiple.holm(frame.loc[confirmatory, "p_t"].to_numpy(np.float64))
    judged = [_judged(row, settings) for row in frame.to_dict("records")]
    columns = pd.DataFrame(judged, index=frame.index, columns=list(_JUDGED), dtype=object)
    frame[list(_JUDGED)] = columns
    return frame.astype(_TYPES | dict.fromkeys(numbers, "float64"))


def _judged(row: Mapping[Any, Any], settings: Settings) -> dict[str, Any]:
    """The columns ``_JUDGED`` of a cell whose other columns are filled."""
    alpha, n, d, notes = row["alpha_corrected"], row["n"], row["cohen_d"], row["notes"]
    rule = Rule(
        alpha=settings.alpha,
        alpha_corrected=alpha,
        margin=settings.margin,
        superiority_margin=settings.superiority_margin,
    )
    spread = not math.isnan(d)  # otherwise neither d nor anything that rests on it
    corrected = exact_interval(d, n, 1 - 2 * alpha) if spread else (math.nan, math.nan)
    evidence = Evidence(
        missing=row["reason"],
        orientation=row["orientation"],
        n=n,
        d=d,
        exact_95=_bounds(row, "d"),
        exact_corrected=corrected,
        cluster_95=_bounds(row, "d_boot"),
        cluster_90=_bounds(row, "d_boot90"),
        superiority_90=_bounds(row, "superiority90"),
        p_t=row["p_t"],
        p_wilcoxon=row["p_wilcoxon"],
        p_t_cluster=row["p_t_cluster"],
        p_permutation=_known(row["p_permutation"]),
        median_abs_effect=row["median_abs_effect"],
        noise_floor=_known(row["noise_floor"]),
    )
    found = verdict(evidence, rule)
    needed = needed_n(d, alpha) if spread else None
    if spread and needed is None:
        notes = "; ".join(filter(None, [notes, "n_needed_80: more than 10^9 pairs"]))
    uncorrected = exact_interval(d, n, 1 - 2 * settings.alpha) if spread else (math.nan, math.nan)
    estimable = not row["reason"]
    return {
        "dual_test": bool(row["p_t"] < alpha and row["p_wilcoxon"] < alpha and row["mean_diff"] > 0)
        if spread
        else None,
        "equivalence": practically_null(evidence, rule, corrected) if estimable else None,
        "equivalence_low": corrected[0],
        "equivalence_high": corrected[1],
        "equivalence_uncorrected": practically_null(evidence, rule, uncorrected) if estimable else None,
        "mde_80": detectable_d(n, alpha) if spread else math.nan,
        "n_needed_80": needed,
        "n_to_decide": found.n_to_decide,
        "verdict": found.word,
        "reason": found.reason,
        "notes": notes,
    }


def _bounds(row: Mapping[Any, Any], name: str) -> Bounds:
    return row[f"{name}_low"], row[f"{name}_high"]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
