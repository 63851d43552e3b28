"""The pooled line: one metric against one outcome over all audited layers of a model, and over models.

Layers are audited at the same tokens, so their cells are not independent. They are averaged within the token first, and
only tokens, by document, count as repetitions. Shapes: N pairs of a layer, P positions (tokens) with a pair somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from audit.statistics.bootstrap import mean_interval
from audit.statistics.cell import Pairs, Settings, in_units, no_spread, seed_of
from audit.statistics.paired import cluster_t

POOLED = ("model", "metric", "outcome", "intervention", "scope")
COLUMNS = (
    *(*POOLED, "label", "orientation", "layers", "layers_left_out", "positions", "positions_incomplete", "documents"),
    *("mean_d", "mean_d_low", "mean_d_high", "p_t_cluster", "tau2", "i2", "notes"),
)
ACROSS = ("models", "z", "p_stouffer", "notes")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPairs:
    """The pairs of one layer's cell, and the number [N] of each pair's token; a token has one number at all layers."""

    token_N: NDArray[np.int64]
    pairs: Pairs

    def scaled(self) -> ScaledLayer:
        """The layer's differences in units of their standard deviation."""
        token_N, document_N = self.token_N, self.pairs.document_N
        reason = no_spread(self.pairs.finite())
        if reason:
            return ScaledLayer(token_N=token_N[:0], document_N=document_N[:0], scaled_N=np.zeros(0), reason=reason)
        diff_N = self.pairs.high_N - self.pairs.low_N
        order_N = np.argsort(token_N)  # so that the order of the pairs does not change a sum's last digits
        order_N = order_N[np.isfinite(diff_N[order_N])]
        unit_N, _ = in_units(diff_N[order_N])
        scaled_N = unit_N / unit_N.std(ddof=1)
        return ScaledLayer(token_N=token_N[order_N], document_N=document_N[order_N], scaled_N=scaled_N)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaledLayer:
    """What a pooled line takes from one layer: tokens in ascending order, their documents, and their differences [N].

    ``reason``: why the layer is left out, with no tokens then; empty where it is not.
    """

    token_N: NDArray[np.int64]
    document_N: NDArray[np.int64]
    scaled_N: NDArray[np.float64]
    reason: str = ""


class PooledLine:
    """A metric over the layers of a model, which are added one after the other.

    Every layer's differences are divided by their standard deviation, averaged over the layers within a token (over
    those where it has a pair; ``positions_incomplete`` counts tokens that lack some), and tested over tokens: mean
    (``mean_d``, a d averaged over layers), document-cluster-robust t, BCa interval by document. Layers whose
    differences have no spread are left out and named. ``tau2`` and ``i2``: :func:`heterogeneity` of the layers' d.
    Memory: 40 bytes per token, however many layers. Source: this project.
    """

    def __init__(self) -> None:
        self._token_P = self._document_P = self._layers_P = np.zeros(0, np.int64)
        self._sum_P = self._lost_P = np.zeros(0)
        self._ds: list[float] = []
        self._sizes: list[int] = []
        self._left_out: list[str] = []

    def add(self, layer: int, found: ScaledLayer) -> None:
        """Layers are added in ascending order: the last digits of the sums depend on it."""
        if found.reason:
            self._left_out.append(f"layer {layer} left out: {found.reason}")
            return
        self._ds.append(float(found.scaled_N.mean()))
        self._sizes.append(len(found.scaled_N))
        self._make_room(found)
        at_N = np.searchsorted(self._token_P, found.token_N)
        # Kahan's sum: what rounding takes from one layer is given back with the next.
        sum_N = self._sum_P[at_N]
        added_N = found.scaled_N - self._lost_P[at_N]
        total_N = sum_N + added_N
        self._lost_P[at_N] = (total_N - sum_N) - added_N
        self._sum_P[at_N] = total_N
        self._layers_P[at_N] += 1

    def row(self, key: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        """For :func:`pooled_table`; ``key``: ``POOLED``, ``label``, ``orientation``."""
        missing = [name for name in (*POOLED, "label") if name not in key]
        assert not missing, f"key lacks {missing}"
        notes = list(self._left_out)
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"orientation": 1} | dict(key)
        row |= {"layers": len(self._ds), "layers_left_out": len(self._left_out)}
        row |= {"positions": 0, "positions_incomplete": 0, "documents": 0}
        if not self._ds:
            row["notes"] = "; ".join([*notes, "no layer has differences with a spread"])
            return row
        order_P = np.lexsort((self._token_P, self._document_P))
        mean_P, document_P = (self._sum_P / self._layers_P)[order_P], self._document_P[order_P]
        row["positions"], row["documents"] = len(mean_P), len(np.unique(document_P))
        row["positions_incomplete"] = int((self._layers_P < len(self._ds)).sum())
        row["mean_d"] = float(mean_P.mean())
        seed = seed_of((key[name] for name in POOLED), settings)
        interval = mean_interval(mean_P, document_P, level=0.95, draws=settings.bootstrap_draws, seed=seed)
        row["mean_d_low"], row["mean_d_high"] = interval.low, interval.high
        row["p_t_cluster"] = cluster_t(mean_P, document_P)
        notes += [f"interval: {interval.reason}"] if interval.reason else []
        if math.isnan(row["p_t_cluster"]):
            notes.append("p_t_cluster: one document, or documents that do not differ")
        if len(self._ds) < 2:
            notes.append("tau2, i2: fewer than two layers")
        else:
            row["tau2"], row["i2"] = heterogeneity(np.array(self._ds), np.array(self._sizes))
        row["notes"] = "; ".join(notes)
        return row

    def _make_room(self, found: ScaledLayer) -> None:
        """A place for every token of the layer that none before had."""
        new_N = ~np.isin(found.token_N, self._token_P, assume_unique=True)
        at_N = np.searchsorted(self._token_P, found.token_N[new_N])
        self._token_P = np.insert(self._token_P, at_N, found.token_N[new_N])
        self._document_P = np.insert(self._document_P, at_N, found.document_N[new_N])
        self._layers_P = np.insert(self._layers_P, at_N, 0)
        self._sum_P, self._lost_P = np.insert(self._sum_P, at_N, 0.0), np.insert(self._lost_P, at_N, 0.0)


def pooled_row(layers: Mapping[int, LayerPairs], key: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The :class:`PooledLine` of layers that are all at hand."""
    line = PooledLine()
    for layer in sorted(layers):
        line.add(layer, layers[layer].scaled())
    return line.row(key, settings)


def pooled_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of :func:`pooled_row` as a table with the columns ``COLUMNS``, sorted by ``POOLED``."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS)).sort_values(list(POOLED), ignore_index=True)
    counts = ("orientation", "layers", "layers_left_out", "positions", "positions_incomplete", "documents")
    numbers = ("mean_d", "mean_d_low", "mean_d_high", "p_t_cluster", "tau2", "i2")
    types = dict.fromkeys(counts, "int64") | dict.fromkeys(numbers, "float64")
    return frame.astype(types | dict.fromkeys((*POOLED, "label", "notes"), "str"))


def heterogeneity(d_L: NDArray[np.float64], n_L: NDArray[np.int64]) -> tuple[float, float]:
    """tau^2 and I^2 of DerSimonian and Laird (1986) over L >= 2 layers, from their d and numbers of pairs.

    v = 1/n + d^2/(2n), w = 1/v, Q = sum w (d - weighted mean)^2; tau^2 = max(0, (Q - (L - 1)) / (sum w - sum w^2 /
    sum w)), I^2 = max(0, 1 - (L - 1) / Q). They describe how much d varies over layers; as layers share tokens, Q is
    not a test here. (statsmodels' ``combine_effects`` divides by 0 and takes roots of negatives where Q is small.)
    """
    w_L = 1 / (1 / n_L + d_L**2 / (2 * n_L))
    total, spare = w_L.sum(), len(d_L) - 1
    q = float((w_L * (d_L - (w_L * d_L).sum() / total) ** 2).sum())
    if q <= spare:
        return 0.0, 0.0
    return float((q - spare) / (total - (w_L**2).sum() / total)), 1 - spare / q


def stouffer(p_M: NDArray[np.float64], sign_M: NDArray[np.float64]) -> tuple[float, float]:
    """Stouffer's z and two-sided p from the two-sided p and the signs of the effects of M independent models.

    z = sum of the models' signed z / sqrt(M): models weigh the same. Not for layers of one model: they share tokens.
    """
    smallest = np.finfo(np.float64).tiny  # a p that underflowed to 0 is no infinite evidence
    z = float((np.sign(sign_M) * stats.norm.isf(np.maximum(p_M, smallest) / 2)).sum() / math.sqrt(len(p_M)))
    return z, float(2 * stats.norm.sf(abs(z)))


def across_models(pooled: pd.DataFrame) -> pd.DataFrame:
    """Stouffer's z and p of every (metric, outcome, intervention, scope) over the models of a pooled table.

    Columns: these four, ``models`` that entered, ``z``, ``p_stouffer``, ``notes`` that name what did not enter.
    """
    keys = list(POOLED[1:])
    rows: list[dict[str, Any]] = []
    for values, lines in pooled.groupby(keys, sort=True):
        known = lines[lines["p_t_cluster"].notna()]
        left_out = sorted(set(lines["model"]) - set(known["model"]))
        row: dict[str, Any] = dict(zip(keys, values, strict=True)) | {
            "models": len(known),
            "z": None,
            "p_stouffer": None,
        }
        notes = [f"without p_t_cluster: {', '.join(left_out)}"] if left_out else []
        if len(known) < 2:
            notes.append("fewer than two models: nothing to combine")
        else:
            row["z"], row["p_stouffer"] = stouffer(
                known["p_t_cluster"].to_numpy(np.float64), known["mean_d"].to_numpy(np.float64)
            )
        rows.append(row | {"notes": "; ".join(notes)})
    frame = pd.DataFrame(rows, columns=[*keys, *ACROSS])
    return frame.astype({"models": "int64", "z": "float64", "p_stouffer": "float64"})
