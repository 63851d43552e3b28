"""The pruning table: what every document loses under every planned pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray

from audit.corpus import TokenSequence
from audit.models.moe_model import MoEModel
from audit.packing import packed
from audit.pruning.limits import model_limits
from audit.pruning.plan import Pruning, RemovalOrders
from audit.pruning.schema import PRUNING
from audit.pruning.simulation import PrunedForward


def prune_table(
    model: MoEModel,
    sequences: Sequence[TokenSequence],
    prunings: Sequence[Pruning],
    metric_table: pd.DataFrame,
    *,
    seed: int,
    batch_tokens: int = 1024,
) -> pa.Table:
    """A row (schema ``PRUNING``) per pruning and document; sums over tokens, losses and KL(unpruned || pruned) in nats.

    About ``batch_tokens`` tokens run side by side; a batch holds (layers x hidden size + 2 x vocabulary) x tokens
    values. Prunings that remove the same experts run once. Raises ValueError where a pruning cannot be carried out.
    """
    orders = RemovalOrders(metric_table, model_limits(model), seed)
    removed = [orders.removed(pruning) for pruning in prunings]
    distinct = {tuple(experts.items()): number for number, experts in enumerate(removed)}  # the last of equal ones
    documents, place = np.unique([s.document for s in sequences], return_inverse=True)
    tokens, baseline = np.zeros(len(documents), np.int64), np.zeros(len(documents))
    loss = {key: np.zeros(len(documents)) for key in distinct}
    kl = {key: np.zeros(len(documents)) for key in distinct}
    for batch in packed(range(len(sequences)), lambda number: len(sequences[number]), batch_tokens):
        ids = [torch.from_numpy(sequences[number].token_ids).to(model.device) for number in batch]
        forward = PrunedForward(model, ids)
        owner_T = np.repeat([place[number] for number in batch], [len(s) for s in ids])
        owner_M = owner_T[forward.rows_M.cpu().numpy()]
        tokens += np.bincount(owner_M, minlength=len(documents))
        baseline += _sums(owner_M, forward.baseline_loss_M, len(documents))
        for key, number in distinct.items():
            found = forward.outcomes(removed[number])
            loss[key] += _sums(owner_M, found.delta_loss, len(documents))
            kl[key] += _sums(owner_M, found.kl, len(documents))
    keys = [tuple(experts.items()) for experts in removed]
    named = pa.Table.from_pylist([asdict(pruning) for pruning in prunings], pa.schema(list(PRUNING)[:6]))
    columns = {
        "document": np.tile(documents.astype(np.int32), len(prunings)),
        "tokens": np.tile(tokens, len(prunings)),
        "loss_sum": np.concatenate([baseline[:0], *(baseline + loss[key] for key in keys)]),
        "baseline_loss_sum": np.tile(baseline, len(prunings)),
        "kl_sum": np.concatenate([baseline[:0], *(kl[key] for key in keys)]),
    }
    table = named.take(np.repeat(np.arange(len(prunings)), len(documents)))
    for name, values in columns.items():
        table = table.append_column(PRUNING.field(name), pa.array(values))
    return table


def _sums(owner_M: NDArray[np.int64], value_M: torch.Tensor, documents: int) -> NDArray[np.float64]:
    """Sums [documents] of the rows of each, in float64."""
    sums = np.bincount(owner_M, weights=value_M.double().cpu().numpy(), minlength=documents)
    return sums.astype(np.float64, copy=False)  # without a row bincount counts in integers
