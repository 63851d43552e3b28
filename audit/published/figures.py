"""The published figures as data frames (arXiv 2606.10703; where they come from: data/SOURCE.md)."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

MODELS = ("OLMoE-1B-7B-0924", "Qwen1.5-MoE-A2.7B", "DeepSeek-V2-Lite")
METRICS = ("utilization", "mean_routing_weight", "activation_norm", "activation_std")

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal
# numpy's default, ddof 0, in the code for OLMoE and DeepSeek; all controls divide by the sd with ddof 1.
_DDOF = {"OLMoE-1B-7B-0924": 0, "Qwen1.5-MoE-A2.7B": 1, "DeepSeek-V2-Lite": 0}


def published_cells(model: str | None = None) -> pd.DataFrame:
    """The importance cells, of one model or of all: a row per (model, layer, metric).

    Columns: ``model``, ``layer``, ``metric``, ``n`` pairs, ``mean_diff`` (nats), ``cohen_d`` as published, ``ddof``
    of the sd in it, its 95 % interval ``d_low``, ``d_high`` (d ± 1.96 sqrt(1/n + d²/(2n)), this project's), ``p_t``,
    ``p_wilcoxon``. Raises ValueError for a model that was not published.
    """
    table = _of(_read("importance_cells.csv"), model).rename(columns={"mean_diff_nats": "mean_diff"})
    return _with_interval(table.assign(ddof=table["model"].map(_DDOF)))


def published_control(model: str | None = None) -> pd.DataFrame:
    """The token's own routing weight as predictor: a row per (model, layer), columns as of ``published_cells``.

    There is no ``metric`` and no ``mean_diff``. ``p_wilcoxon`` is NaN where it was not published; so are four of
    OLMoE's five layers, which have no row. Raises ValueError for a model that was not published.
    """
    return _with_interval(_of(_read("routing_weight_control.csv"), model).assign(ddof=1))


def published_progressive(model: str | None = None) -> pd.DataFrame:
    """Removing 1 to 7 of a token's 8 active experts: a row per (model, layer, order, count). OLMoE only.

    Columns: ``model``, ``layer``, ``n`` tokens, ``order`` (``descending_weight``), ``count`` removed,
    ``mean_delta_loss``, ``sd_delta_loss``, ``median_delta_loss``, ``p95_delta_loss`` (nats), ``share_positive``.
    Empty for a model whose experts were not removed in this way; ValueError for one that was not published.
    """
    return _of(_read("progressive_ablation.csv"), model)


def published_gap_norm(model: str | None = None) -> pd.DataFrame:
    """``mean_gap_norm`` by (model, layer): mean over experts of the mean norm of an expert's contribution.

    OLMoE (all layers) and Qwen (five). Empty for DeepSeek; ValueError for a model that was not published.
    """
    return _of(_read("gap_norm_by_layer.csv"), model)


def published_expert_metrics(model: str | None = None) -> pd.DataFrame:
    """The four metrics as the released code computed them: a row per (model, layer, expert, metric), and ``value``.

    Released of DeepSeek-V2-Lite, layer 26, alone; empty for the others, ValueError for a model not published. The
    metric names are those of ``audit.published.released_code``.
    """
    wide = _of(_read("expert_metrics.csv"), model)
    return wide.melt(["model", "layer", "expert"], var_name="metric", value_name="value")


@cache
def model_facts() -> dict[str, Any]:
    """What is known of the three checkpoints: by model and field ``value``, ``source`` and ``verified``.

    ``data/models.yaml`` says what the sources are. Fields are named as in the configuration class of transformers.
    """
    facts: dict[str, Any] = yaml.safe_load(_file("models.yaml").read_text("utf-8"))["models"]
    return facts


def d_variance(d: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Large-sample variance of Cohen's d_z of n independent pairs: 1/n + d²/(2n) (normal differences)."""
    return 1 / n + d**2 / (2 * n)


def check_model(model: str) -> None:
    """Raise ValueError where ``model`` is not the published name of one of the three."""
    if model not in MODELS:
        raise ValueError(f"model: {model!r} was not published; published are {', '.join(MODELS)}")


def _file(name: str) -> Any:
    return resources.files(__package__) / "data" / name


@cache
def _read(name: str) -> pd.DataFrame:
    with resources.as_file(_file(name)) as path:
        return pd.read_csv(path)


def _of(table: pd.DataFrame, model: str | None) -> pd.DataFrame:
    if model is None:
        return table.copy()
    check_model(model)
    return table[table["model"] == model].reset_index(drop=True)


def _with_interval(table: pd.DataFrame) -> pd.DataFrame:
    # From d and n again rather than from the file, which holds two decimals.
    d, n = table["cohen_d"].to_numpy(np.float64), table["n"].to_numpy(np.float64)
    half = _Z * np.sqrt(d_variance(d, n))
    return table.assign(d_low=d - half, d_high=d + half)
