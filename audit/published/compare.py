"""Our tables beside the published ones: the difference, its 95 % interval, and whether both agree within it.

The two studies are taken as independent samples of tokens of one model. They are not quite: the texts are the same, so
some tokens are in both, which makes the intervals a little too wide; and tokens of one text are alike, which makes the
published part of them a little too narrow. At 5 % per row one of 20 rows disagrees by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.published.figures import (
    d_variance,
    published_cells,
    published_control,
    published_gap_norm,
    published_progressive,
)

Label = Literal["published", "published_code"]

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal
_PUBLISHED = {
    "n": "published_n",
    "cohen_d": "published_d",
    "d_low": "published_d_low",
    "d_high": "published_d_high",
    "p_t": "published_p_t",
    "p_wilcoxon": "published_p_wilcoxon",
}
_OURS = ["n", "cohen_d", "d_low", "d_high", "p_t", "p_wilcoxon", "verdict"]


def side_by_side(
    cells: pd.DataFrame, model: str, *, scope: str = "sequence", label: Label = "published"
) -> pd.DataFrame:
    """A row for each published cell of ``model`` (layer, metric), with our cell of outcome ``delta_loss``, ``zero``.

    ``cells`` is the cell table of one audit of that model, whatever name the table gives it; ``model`` is the published
    name. ``label="published_code"`` takes the cells of metrics as the released code computed them instead.

    Columns: ``layer``, ``metric``; ``published_n``, ``published_d`` with ``published_d_low/high``, ``published_p_t``,
    ``published_p_wilcoxon``; our ``n``, ``cohen_d``, ``d_low``, ``d_high``, ``p_t``, ``p_wilcoxon``, ``verdict``;
    ``difference`` of the d's (ours minus theirs, theirs first brought to ddof 1: d sqrt((n - 1)/n)) with
    ``difference_low/high`` = ± 1.96 sqrt(v + v'), v = 1/n + d²/(2n) (this project); ``agrees``: whether 0 lies between
    them, null where it cannot be told, and then ``reason`` says why.

    Raises ValueError for an unknown model, a missing column, two audits in one table and a cell that is there twice.
    """
    theirs = published_cells(model)
    ours = _select(cells, {"label": [label]}, scope)
    ours = ours.assign(metric=ours["metric"].str.removeprefix("released_"))
    return _compare_d(theirs, ours, ["layer", "metric"])


def side_by_side_control(cells: pd.DataFrame, model: str, *, scope: str = "sequence") -> pd.DataFrame:
    """A row for each published layer of the control (the token's routing weight); columns as of ``side_by_side``,
    without ``metric``. Raises ValueError as it does.
    """
    theirs = published_control(model)
    ours = _select(cells, {"label": ["control"], "metric": ["routing_weight"]}, scope)
    return _compare_d(theirs, ours.drop(columns="metric"), ["layer"])


def side_by_side_progressive(effects: pd.DataFrame, model: str, *, scope: str = "sequence") -> pd.DataFrame:
    """A row for each published (layer, count): mean ``delta_loss`` (nats) once ``count`` experts are removed.

    ``effects``: rows of the effect table, of which those of ``zero`` on the ``highest`` are read. Columns: ``layer``,
    ``order``, ``count``; ``published_n``, ``published_mean``; our ``n``, ``documents``, ``mean``; ``difference`` with
    ``difference_low/high`` = ± 1.96 sqrt(sd²/n + v'), v' the variance of our mean, robust to clusters (documents);
    ``agrees`` and ``reason``. Raises ValueError for an unknown model or a missing column.
    """
    theirs = published_progressive(model)
    _require(effects, ["document", "layer", "intervention", "target", "parameter", "scope", "delta_loss"])
    removed = effects[
        (effects["intervention"] == "zero") & (effects["target"] == "highest") & (effects["scope"] == scope)
    ]
    rows = []
    for cell in theirs.to_dict("records"):
        at = removed[(removed["layer"] == cell["layer"]) & (removed["parameter"] == cell["count"])]
        at = at[np.isfinite(at["delta_loss"].to_numpy(np.float64))]
        value_N, document_N = at["delta_loss"].to_numpy(np.float64), at["document"].to_numpy()
        mean, variance = _cluster_mean(value_N, document_N)
        rows.append(
            {
                **{name: cell[name] for name in ("layer", "order", "count")},
                "published_n": cell["n"],
                "published_mean": cell["mean_delta_loss"],
                "n": len(at),
                "documents": len(set(document_N)),
                "mean": mean,
                "_variance": variance + cell["sd_delta_loss"] ** 2 / cell["n"],
                "reason": ""
                if np.isfinite(variance)
                else f"{len(set(document_N))} documents with this removal (zero, highest, scope {scope}); "
                "two are needed for an interval",
            }
        )
    columns = ["layer", "order", "count", "published_n", "published_mean", "n", "documents", "mean", "_variance"]
    table = pd.DataFrame(rows, columns=[*columns, "reason"])
    return _judge(table, table["mean"] - table["published_mean"])


def side_by_side_gap_norm(effects: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row for each published layer: mean over experts of their mean ``gap_norm``, both sides, and the ``ratio``.

    ``effects``: rows of the effect table, of which those of ``zero`` on one expert are read; the scope is of no
    matter to what is taken from the layer itself. Columns: ``layer``, ``published_gap_norm``, ``gap_norm``, ``experts``
    with a row, ``ratio`` = ours / theirs, ``agrees`` (always null) and ``reason``. ``table.attrs["profile_rho"]`` is
    Spearman's rank correlation of the two profiles over the layers both have; NaN for fewer than three.

    Agreement is not judged: the released code reads an expert's tokens off router rows that hold padding, but outputs
    that do not, so that most of the tokens it averages over are not the expert's, and its means are too small.
    Raises ValueError for an unknown model or a missing column.
    """
    theirs = published_gap_norm(model)
    _require(effects, ["layer", "unit", "expert", "intervention", "gap_norm"])
    ours = effects[(effects["unit"] == "expert") & (effects["intervention"] == "zero")]
    means = ours.groupby(["layer", "expert"], observed=True)["gap_norm"].mean().groupby("layer")
    profile = pd.DataFrame({"gap_norm": means.mean(), "experts": means.size()})
    table = theirs.rename(columns={"mean_gap_norm": "published_gap_norm"}).drop(columns="model")
    table = table.merge(profile, how="left", left_on="layer", right_index=True)
    table["experts"] = table["experts"].fillna(0).astype("int64")
    table["ratio"] = table["gap_norm"] / table["published_gap_norm"]
    table["agrees"] = pd.array([None] * len(table), dtype="boolean")
    table["reason"] = np.where(
        table["gap_norm"].isna(),
        "no effect of zero on one expert at this layer",
        "the published mean is over tokens that mostly are not the expert's",
    )
    both = table.dropna(subset=["gap_norm"])
    rho = both["gap_norm"].corr(both["published_gap_norm"], method="spearman") if len(both) >= 3 else np.nan
    table.attrs["profile_rho"] = float(rho)
    return table


def agreement(table: pd.DataFrame) -> str:
    """One sentence on a table of this module: how many rows agree, differ, and could not be compared."""
    agrees = table["agrees"]
    judged, same = int(agrees.notna().sum()), int(agrees.sum())
    missing = len(table) - judged
    said = f"{same} of {judged} compared rows agree within the 95 % interval of the difference"
    if judged:
        said += f" ({0.05 * judged:.1g} would differ by chance)"
    return f"{said}; {missing} could not be compared" if missing else said


def _select(cells: pd.DataFrame, wanted: dict[str, list[str]], scope: str) -> pd.DataFrame:
    wanted = {**wanted, "outcome": ["delta_loss"], "intervention": ["zero"], "scope": [scope]}
    _require(cells, ["model", "layer", "metric", *wanted, *_OURS])
    if cells["model"].nunique() > 1:
        raise ValueError(
            f"cells: the table holds models {', '.join(sorted(map(str, cells['model'].unique())))}; "
            "give the cells of one audit"
        )
    chosen = np.all([cells[column].isin(values).to_numpy() for column, values in wanted.items()], axis=0)
    return cells.loc[chosen, ["layer", "metric", *_OURS]]


def _compare_d(theirs: pd.DataFrame, ours: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    twice = ours[ours.duplicated(key)]
    if len(twice):
        raise ValueError(f"cells: {twice.iloc[0][key].to_dict()} is there twice; give the cells of one audit")
    n = theirs["n"].to_numpy(np.float64)
    d = theirs["cohen_d"].to_numpy(np.float64) * np.sqrt(np.where(theirs["ddof"] == 0, (n - 1) / n, 1.0))
    left = theirs[[*key, *_PUBLISHED]].rename(columns=_PUBLISHED)
    table = left.assign(_d=d).merge(ours, on=key, how="left", validate="one_to_one", indicator="_from")
    our_d = table["cohen_d"].to_numpy(np.float64)
    our_n = table["n"].where(table["n"] > 0).to_numpy(np.float64)  # no pair has no variance, rather than 1/0
    table["_variance"] = d_variance(d, n) + d_variance(our_d, our_n)
    table["reason"] = np.select(
        [table["_from"] == "left_only", ~np.isfinite(our_d)],
        ["not in our cell table", "our d is not estimable"],
        "",
    )
    difference = table["cohen_d"] - table["_d"]
    return _judge(table.drop(columns=["_d", "_from"]), difference)


def _judge(table: pd.DataFrame, difference: pd.Series[float]) -> pd.DataFrame:
    """``difference``, its interval and ``agrees``; the column ``_variance`` of the difference is used up."""
    half = _Z * np.sqrt(table["_variance"].to_numpy(np.float64))
    table = table.assign(difference=difference, difference_low=difference - half, difference_high=difference + half)
    agrees = (table["difference_low"] <= 0) & (table["difference_high"] >= 0)
    table["agrees"] = agrees.astype("boolean").mask(table["difference_low"].isna())
    last = ["difference", "difference_low", "difference_high", "agrees", "reason"]
    return table[[c for c in table.columns if c not in (*last, "_variance")] + last]


def _cluster_mean(value_N: NDArray[np.float64], cluster_N: NDArray[np.generic]) -> tuple[float, float]:
    """Mean, and its variance robust to correlation within clusters: G/(G - 1) sum_g (sum of residuals)² / N².

    NaN for no value, and for one cluster the variance.
    """
    if not len(value_N):
        return float("nan"), float("nan")
    mean = float(value_N.mean())
    _, cluster = np.unique(cluster_N, return_inverse=True)
    sums_G = np.bincount(cluster, value_N - mean)
    clusters = len(sums_G)
    if clusters < 2:
        return mean, float("nan")
    return mean, float(clusters / (clusters - 1) * (sums_G**2).sum() / len(value_N) ** 2)


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"table: column {missing[0]!r} is missing; needed are {', '.join(columns)}")
