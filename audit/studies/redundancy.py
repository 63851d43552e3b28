"""Are the criteria that experts are pruned by interchangeable (a claim of arXiv 2606.10703, tested here)?

Everything is per cell, one (where, share) of a pruning table, and resamples its documents.
Shapes: C prunings, M metrics, G documents, B bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from audit.statistics.multiple import holm

Floats = NDArray[np.float64]

FEWEST_DRAWS = 199  # random draws below which a result is called descriptive

_SUMS = ["tokens", "loss_sum", "baseline_loss_sum", "kl_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedundancySettings:
    """``margin``: spread of the metrics' KL, in units of the mean KL of random draws, that is practically none."""

    margin: float = 0.1
    bootstrap_draws: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RedundancyTables:
    """``criteria``: a row per cell, criterion, order and outcome; ``verdicts``: a row per cell."""

    criteria: pd.DataFrame
    verdicts: pd.DataFrame


def redundancy_tables(table: pa.Table, settings: RedundancySettings) -> RedundancyTables:
    """Both tables (columns: docs/tables.md) of a pruning table.

    Criteria: perplexity, and mean KL(unpruned || pruned) in nats, with 95 % percentile bootstrap intervals by document;
    p = (1 + number of random draws at least as good) / (draws + 1) for each metric, Holm over the metrics of one cell
    and outcome.

    Verdicts: S = (KL of the worst metric - KL of the best) / (mean KL of random draws). Worst and best are chosen on
    the documents they are measured on, so S comes out too large even where all metrics are alike; the ends of its 90 %
    interval allow for that. ``high`` is the largest of the one-sided 95 % upper bounds of all pairs' differences: the
    true S is one of those differences, so its bound alone covers it (intersection-union). ``low`` is S minus the 95 %
    quantile, over draws, of the largest deviation of any pair's difference from its estimate, and holds for every
    pair at once (max-T). ``interchangeable`` where high <= margin, ``criteria differ`` where low > margin, else
    ``undecided``. Source: this project.

    Raises ValueError where the prunings of a cell were not measured on the same tokens.
    """
    criteria: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    # Lists cannot be grouped; ``where`` names the layers.
    frame = table.select([name for name in table.column_names if name != "layers"]).to_pandas()
    for (where, share), rows in frame.groupby(["where", "share"], observed=True, sort=False):
        cell = _Cell.of(rows, f"{where}, share {share}")
        weights_BG = _weights(len(cell.tokens_G), settings)
        place = {"where": where, "share": share}
        criteria += [place | row for row in _criteria(cell, weights_BG)]
        verdicts.append(place | _verdict(cell, weights_BG, settings.margin))
    return RedundancyTables(criteria=pd.DataFrame(criteria), verdicts=pd.DataFrame(verdicts))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cell:
    """The prunings of one (where, share), on the documents that have a token to predict."""

    criterion_C: NDArray[np.object_]
    order_C: NDArray[np.object_]
    tokens_G: Floats
    baseline_G: Floats
    loss_CG: Floats
    kl_CG: Floats
    left_out: int  # documents without a token to predict

    @staticmethod
    def of(rows: pd.DataFrame, place: str) -> _Cell:
        # Random draws are numbered; a number for the others lets pandas use the column as a key.
        named = rows.astype({"criterion": str, "order": str}).assign(draw=rows["draw"].fillna(-1).astype(int))
        keys = ["criterion", "order", "draw"]
        documents = named["document"].nunique()
        if (named.groupby(keys)["document"].agg(["size", "nunique"]) != documents).to_numpy().any():
            raise ValueError(f"pruning table: every pruning of {place} needs one row for each of {documents} documents")
        wide = named.pivot(index=keys, columns="document", values=_SUMS)
        tokens_CG, loss_CG, baseline_CG, kl_CG = (
            wide[name].to_numpy(np.float64) for name in ("tokens", "loss_sum", "baseline_loss_sum", "kl_sum")
        )
        if (tokens_CG != tokens_CG[0]).any():
            raise ValueError(f"pruning table: the prunings of {place} were measured on different tokens")
        has_G = tokens_CG[0] > 0
        names = wide.index.to_frame(index=False)
        return _Cell(
            criterion_C=names["criterion"].to_numpy(object),
            order_C=names["order"].to_numpy(object),
            tokens_G=tokens_CG[0, has_G],
            baseline_G=baseline_CG[0, has_G],
            loss_CG=loss_CG[:, has_G],
            kl_CG=kl_CG[:, has_G],
            left_out=int((~has_G).sum()),
        )

    def notes(self) -> list[str]:
        return [f"{self.left_out} documents without a token to predict left out"] if self.left_out else []


def _criteria(cell: _Cell, weights_BG: Floats) -> list[dict[str, Any]]:
    random_C = cell.order_C == "random"
    baseline = {"perplexity": _perplexity(_per_token(cell.baseline_G[None], cell.tokens_G))[0], "kl": 0.0}
    found: list[dict[str, Any]] = []
    for outcome, sums_CG in (("perplexity", cell.loss_CG), ("kl", cell.kl_CG)):
        per_token_C = _per_token(sums_CG, cell.tokens_G)
        per_token_BC = _drawn(sums_CG, cell.tokens_G, weights_BG)
        value_C, value_BC = (
            (_perplexity(per_token_C), _perplexity(per_token_BC))
            if outcome == "perplexity"
            else (per_token_C, per_token_BC)
        )
        rows = []
        for c in np.flatnonzero(~random_C):
            tested = cell.order_C[c] == "metric"
            p, why = _p_value(value_C[c], value_C[random_C]) if tested else (np.nan, "reverse orders are not tested")
            rows.append(
                {
                    "criterion": cell.criterion_C[c],
                    "order": cell.order_C[c],
                    "draws": 1,
                    **_estimate(value_C[c], value_BC[:, c], cell, [why]),
                    "p": p,
                }
            )
        if random_C.any():
            mean_B = value_BC[:, random_C].mean(axis=1)
            rows.append(
                {
                    "criterion": "random",
                    "order": "random",
                    "draws": int(random_C.sum()),
                    **_estimate(
                        value_C[random_C].mean(), mean_B, cell, ["random draws are what others are tested against"]
                    ),
                    "p": np.nan,
                }
            )
        adjusted = holm(np.array([row["p"] for row in rows], np.float64))
        found += [
            {"outcome": outcome, "baseline": baseline[outcome]} | row | {"p_holm": p}
            for row, p in zip(rows, adjusted, strict=True)
        ]
    return found


def _estimate(value: float, value_B: Floats, cell: _Cell, reasons: list[str]) -> dict[str, Any]:
    """Value, 95 % interval and what must be said of them."""
    low = high = np.nan
    if not len(cell.tokens_G):
        reasons = ["no document has a token to predict", *reasons]
    elif not np.isfinite(value):
        reasons = ["the sums of some documents are not finite", *reasons]
    elif len(cell.tokens_G) == 1:
        reasons = ["one document: there is nothing to resample", *reasons]
    else:
        low, high = np.quantile(value_B, [0.025, 0.975])
    said = "; ".join(reason for reason in [*reasons, *cell.notes()] if reason)
    return {"value": float(value), "low": float(low), "high": float(high), "reason": said}


def _p_value(value: float, random_R: Floats) -> tuple[float, str]:
    if not len(random_R):
        return np.nan, "no random draws to compare with"
    if not np.isfinite([value, *random_R]).all():
        return np.nan, "some prunings have no finite value to compare"
    return (1 + int((random_R <= value).sum())) / (len(random_R) + 1), ""


def _verdict(cell: _Cell, weights_BG: Floats, margin: float) -> dict[str, Any]:
    metric_C, random_C = cell.order_C == "metric", cell.order_C == "random"
    kl_C, kl_BC = _per_token(cell.kl_CG, cell.tokens_G), _drawn(cell.kl_CG, cell.tokens_G, weights_BG)
    draws, documents = int(random_C.sum()), len(cell.tokens_G)
    row: dict[str, Any] = {
        "verdict": "not estimable",
        "spread": np.nan,
        "low": np.nan,
        "high": np.nan,
        "margin": margin,
        "best": None,
        "worst": None,
        "metrics": int(metric_C.sum()),
        "draws": draws,
        "documents": documents,
        "tokens": int(cell.tokens_G.sum()),
        "descriptive": draws < FEWEST_DRAWS,
    }
    notes = cell.notes()
    if draws < FEWEST_DRAWS:
        notes.append(f"{draws} random draws, fewer than {FEWEST_DRAWS}: descriptive")
    reason = _not_estimable(metric_C, kl_C, random_C, documents)
    if reason is None and not (kl_BC[:, random_C].mean(axis=1) > 0).all():
        reason = "in some bootstrap draws random prunings change nothing"
    if reason is not None:
        return row | {"reason": "; ".join([reason, *notes])}
    # KL of each metric in units of the mean KL of random draws, of the same documents.
    unit_M = kl_C[metric_C] / kl_C[random_C].mean()
    unit_BM = kl_BC[:, metric_C] / kl_BC[:, random_C].mean(axis=1, keepdims=True)
    spread = float(np.ptp(unit_M))
    deviation_B = np.ptp(unit_BM - unit_M, axis=1)  # the largest over pairs is the range
    low = max(0.0, spread - float(np.quantile(deviation_B, 0.95)))
    difference_BMM = unit_BM[:, :, None] - unit_BM[:, None, :]
    high = float(np.quantile(difference_BMM, 0.95, axis=0).max())
    verdict = "interchangeable" if high <= margin else "criteria differ" if low > margin else "undecided"
    names_M = cell.criterion_C[metric_C]
    found = {
        "verdict": verdict,
        "spread": spread,
        "low": low,
        "high": high,
        "best": names_M[unit_M.argmin()],
        "worst": names_M[unit_M.argmax()],
    }
    return row | found | {"reason": "; ".join(notes)}


def _not_estimable(
    metric_C: NDArray[np.bool_], kl_C: Floats, random_C: NDArray[np.bool_], documents: int
) -> str | None:
    if metric_C.sum() < 2:
        return f"{int(metric_C.sum())} metrics: there is nothing to compare"
    if not random_C.any():
        return "no random draws to compare with"
    if documents < 2:
        return f"{documents} documents with a token to predict: there is nothing to resample"
    if not np.isfinite(kl_C[metric_C | random_C]).all():
        return "the sums of some documents are not finite"
    if not kl_C[random_C].mean() > 0:
        return "random prunings change nothing"
    return None


def _perplexity(loss: Floats) -> Floats:
    with np.errstate(over="ignore"):  # a mean loss above 709 nats: the perplexity is infinite, and said to be
        perplexity: Floats = np.exp(loss)
    return perplexity


def _per_token(sums_CG: Floats, tokens_G: Floats) -> Floats:
    """Sums [C, G] per token [C]; NaN where there is no token."""
    total = tokens_G.sum()
    return sums_CG.sum(axis=1) / total if total else np.full(len(sums_CG), np.nan)


def _drawn(sums_CG: Floats, tokens_G: Floats, weights_BG: Floats) -> Floats:
    """The same [B, C] in every bootstrap draw."""
    if not len(tokens_G):
        return np.full((len(weights_BG), len(sums_CG)), np.nan)
    # Without optimize, einsum never goes through BLAS, whose last bits depend on its number of threads.
    sums_BC = np.einsum("bg,cg->bc", weights_BG, np.ascontiguousarray(sums_CG), optimize=False)
    tokens_B = np.einsum("bg,g->b", weights_BG, tokens_G, optimize=False)
    drawn_BC: Floats = sums_BC / tokens_B[:, None]
    return drawn_BC


def _weights(documents: int, settings: RedundancySettings) -> Floats:
    """How often each document comes in every draw [B, G]; one seed, so cells of the same documents draw the same."""
    if not documents:
        return np.zeros((settings.bootstrap_draws, 0))
    drawn_BG = np.random.default_rng(settings.seed).multinomial(
        documents, np.full(documents, 1 / documents), settings.bootstrap_draws
    )
    return drawn_BG.astype(np.float64)
