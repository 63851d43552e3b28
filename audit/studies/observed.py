"""Every observational metric of a run in one table, over all domains and for each."""

from __future__ import annotations

import pandas as pd

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
