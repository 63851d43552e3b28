"""Metrics that need no token: what the router's and the experts' weights alone say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

COLUMNS = ("layer", "expert", "router_row_norm", "expert_weight_norm", "aimer")


def weight_statistics(layer: int, router_ED: Tensor, expert_tensors: Iterable[Sequence[Tensor]]) -> pd.DataFrame:
    """A row per expert of one layer; the frames of several layers are concatenated by the caller.

    ``router_ED``: the router's weight, a row per expert. ``expert_tensors``: for each expert in turn its weight
    matrices (biases are left out); an iterator is read once, so offloaded weights need to be present one expert at a
    time. router_row_norm = ||row||_2, expert_weight_norm = Frobenius norm over all matrices (MC-Suite), aimer = mean
    |W| / rms W over all entries (arXiv 2603.18492; at most 1, high = prune first, NaN for all-zero weights). Sums in
    float64. Raises ValueError where the number of experts is not that of the router's rows.
    """
    rows = []
    for tensors in expert_tensors:
        entries = sum(w.numel() for w in tensors)
        absolute = sum(w.abs().sum(dtype=torch.float64) for w in tensors)
        squares = sum(torch.linalg.vector_norm(w, dtype=torch.float64).square() for w in tensors)
        absolute, squares = torch.as_tensor(absolute), torch.as_tensor(squares)
        rows.append(torch.stack([squares.sqrt(), absolute / entries / (squares / entries).sqrt()]).cpu())
    if len(rows) != len(router_ED):
        raise ValueError(
            f"expert_tensors: layer {layer} has weights of {len(rows)} experts, but its router {len(router_ED)} rows"
        )
    router_E = torch.linalg.vector_norm(router_ED, dim=1, dtype=torch.float64).cpu()
    values = torch.cat([router_E[:, None], torch.stack(rows)], dim=1).numpy()
    frame = pd.DataFrame(values, columns=list(COLUMNS[2:]))
    frame.insert(0, "layer", layer)
    frame.insert(1, "expert", range(len(frame)))
    return frame
