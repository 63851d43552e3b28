"""Every observational metric of a run in one table, over all domains and for each."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.observations import Observations, metrics


def metric_table(observations: Observations, weights: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of ``audit.observations.metrics`` with the column ``domain`` in front, null over all domains together.

    Metrics of weights alone do not depend on the domain and stand only in the rows over all domains.
    """
    pooled = metrics(observations, weights if weights is not None and len(weights) else None)
    frames = [pooled.assign(domain=None)]
    frames += [metrics(observations, None, domain).assign(domain=domain) for domain in observations.domains]
    table = pd.concat(frames, ignore_index=True)
    return table[["domain", *pooled.columns]]


def oriented(table: pd.DataFrame) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Metric: layer: a value per expert [E], high meaning important, of a table of metrics over all domains.

    A metric that claims neither orientation keeps its values.
    """
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    overall = table[table["domain"].isna()]
    for _, rows in overall.groupby(["metric", "layer"], sort=True):
        ordered = rows.sort_values("expert")
        metric, layer = str(rows["metric"].iloc[0]), int(rows["layer"].iloc[0])
        sign = np.where(ordered["orientation"].to_numpy() < 0, -1.0, 1.0)
        found.setdefault(metric, {})[layer] = sign * ordered["value"].to_numpy(np.float64)
    return found
