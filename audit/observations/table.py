"""The observation table: a row per (layer, expert, domain), from which observations are read back without loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from audit.observations.histogram import BINS
from audit.observations.sums import SUMS, LayerSums

OBSERVATIONS = pa.schema(
    [
        ("layer", pa.int16()),
        ("expert", pa.int16()),
        ("domain", pa.dictionary(pa.int8(), pa.string())),
        ("tokens", pa.int64()),  # of the domain, routed to the expert or not
        ("n", pa.int64()),  # routed to the expert
        *((name, pa.float64()) for name in SUMS),
        ("m2_g", pa.float64()),
        ("m2_e", pa.float64()),
        ("max_abs", pa.float64()),  # null where n is 0
        ("mean_output", pa.large_list(pa.float64())),  # null where n is 0
        ("m2_output", pa.large_list(pa.float64())),
        ("histogram", pa.large_list(pa.int64())),
        ("coactivation", pa.large_list(pa.int64())),
    ]
)


def from_sums(layer: int, sums: LayerSums, domains: Sequence[str]) -> pa.Table:
    """The rows of one layer, by expert and then domain, of sums in host memory."""
    experts = len(sums.count_EM)
    count = _numpy(sums.count_EM)
    unused = count == 0
    codes = pa.array(np.tile(np.arange(len(domains), dtype=np.int8), experts))
    columns = {
        "layer": pa.array(np.full(len(count), layer, dtype=np.int16)),
        "expert": pa.array(np.repeat(np.arange(experts, dtype=np.int16), len(domains))),
        "domain": pa.DictionaryArray.from_arrays(codes, list(domains)),
        "tokens": pa.array(np.tile(sums.tokens_M.numpy(), experts)),
        "n": pa.array(count),
        **{name: pa.array(_numpy(sums.column(name))) for name in SUMS},
        "m2_g": pa.array(_numpy(sums.scalar_m2_EM2[..., 0])),
        "m2_e": pa.array(_numpy(sums.scalar_m2_EM2[..., 1])),
        "max_abs": pa.array(_numpy(sums.max_EM), mask=unused),
        "mean_output": _lists(sums.mean_EMD, unused),
        "m2_output": _lists(sums.m2_EMD),
        "histogram": _lists(sums.histogram_EMB),
        "coactivation": _lists(sums.coactivation_EME),
    }
    return pa.table(columns, schema=OBSERVATIONS)


def to_sums(rows: pa.Table, experts: int, domains: int) -> LayerSums:
    """The sums whose rows these are, all of one layer and in the order of ``from_sums``."""

    def cells(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(experts, domains, *values.shape[1:])

    def scalars(*names: str) -> Tensor:
        return cells(np.stack([rows[name].fill_null(0.0).to_numpy() for name in names], axis=1))

    def lists(name: str) -> np.ndarray:
        values = rows[name].combine_chunks().flatten().to_numpy()  # without those that are null
        return np.array(values).reshape(-1, len(values) // max(1, len(rows) - rows[name].null_count))

    count = rows["n"].to_numpy()
    m2 = lists("m2_output")
    mean = np.zeros_like(m2)
    mean[count > 0] = lists("mean_output").reshape(-1, m2.shape[1])
    histogram = lists("histogram")
    assert histogram.shape[1] == BINS
    return LayerSums(
        tokens_M=torch.from_numpy(np.array(rows["tokens"].to_numpy()[:domains])),
        count_EM=cells(np.array(count)),
        sums_EMC=scalars(*SUMS),
        scalar_m2_EM2=scalars("m2_g", "m2_e"),
        max_EM=scalars("max_abs")[..., 0],
        mean_EMD=cells(mean),
        m2_EMD=cells(m2),
        histogram_EMB=cells(histogram),
        coactivation_EME=cells(lists("coactivation")),
    )


def _numpy(x_EM: Tensor) -> np.ndarray:
    return x_EM.flatten().numpy()


def _lists(x_EMX: Tensor, null: np.ndarray | None = None) -> pa.Array:
    values = x_EMX.flatten(0, 1).numpy()
    if null is None:
        null = np.zeros(len(values), dtype=bool)
    offsets = np.concatenate([[0], np.cumsum(~null * values.shape[1])])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values[~null].ravel()), mask=pa.array(null))
