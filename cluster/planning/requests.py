"""What is asked of the engine: the audit's own effects, and those that its studies need beyond.

Whatever a study could not be made of is refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.config import AuditConfig, ConfigError
from audit.config.checks import ranges
from audit.config.studies import ProgressiveConfig
from audit.interventions import Intervention
from audit.models import MoEModel
from audit.models.weights import has_weight_metrics
from audit.observations.registry import METRICS, find_metric
from audit.studies.progressive import progressive_interventions

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Effects that are asked for: which, and where. ``name`` is what its tasks' ids begin with."""

    name: str
    layers: tuple[int, ...]
    interventions: tuple[Intervention, ...]
    positions: Sequence[Positions]  # per audited sequence
    tokens: bool = False  # whether its tasks write the token table
    attribution: bool = False
    redistribution: bool = False


def requests_of(
    config: AuditConfig, model: MoEModel, layers: tuple[int, ...], positions: Sequence[Positions]
) -> list[Request]:
    """The audit's own effects, then those of its studies; only the first writes the token table.

    Raises ConfigError for metrics, layers and interventions that a study cannot be made of.
    """
    studies, interventions = config.studies, config.build_interventions()
    if studies.importance is not None:
        observed_metrics("importance", studies.importance.metrics, model)
    if studies.redistribution and not any(i.kind == "zero" and i.target.selection == "each" for i in interventions):
        raise ConfigError(
            "studies.redistribution: True needs effects of zero on single experts; add {kind: zero} to interventions"
        )
    effects = Request(
        "effects",
        layers,
        interventions,
        positions,
        tokens=True,
        attribution=config.attribution,
        redistribution=studies.redistribution,
    )
    if studies.progressive is None:
        require_distinct(interventions)
        return [effects]
    progressive = _progressive(studies.progressive, model, layers, positions, config.seed)
    require_distinct(interventions, progressive.interventions)
    return [effects, progressive]


def _progressive(
    study: ProgressiveConfig, model: MoEModel, layers: tuple[int, ...], positions: Sequence[Positions], seed: int
) -> Request:
    chosen = layers if study.layers is None else tuple(sorted(set(study.layers)))
    for layer in chosen:
        if layer not in layers:
            raise ConfigError(f"studies.progressive.layers: {layer} is not audited; the layers are {ranges(layers)}")
    metrics = observed_metrics("progressive", study.metrics, model)
    try:
        top_k = min(model.sites[layer].top_k for layer in chosen)
        interventions = progressive_interventions(top_k, metrics, study.draws)
    except ValueError as error:
        raise ConfigError(f"studies.progressive: {error}") from error
    return Request("progressive", chosen, interventions, _thinned(positions, study.positions, seed))


def require_distinct(interventions: Sequence[Intervention], progressive: Sequence[Intervention] = ()) -> None:
    """Raise ConfigError where the effect table could not tell two interventions' effects apart, and would pool them.

    ``progressive``: what that study adds to those of the specification.
    """
    seen: dict[tuple[object, ...], int] = {}
    for number, intervention in enumerate((*interventions, *progressive)):
        target = intervention.target
        parameter = intervention.factor if intervention.kind == "scale" else target.count
        first = seen.setdefault((target.selection, target.metric, intervention.kind, parameter), number)
        if first == number:
            continue
        same = f"target {target.selection}, {intervention.kind}"
        same += "" if parameter is None else f", parameter {parameter:g}"
        if number >= len(interventions):
            raise ConfigError(f"studies.progressive: it measures {same} itself; take interventions.{first} out")
        raise ConfigError(
            f"interventions.{number}: its effects would not be told from those of interventions.{first} ({same}); "
            "give each an audit of its own"
        )


def observed_metrics(study: str, asked: str | Sequence[str], model: MoEModel) -> tuple[str, ...]:
    """The names of the metrics that will be observed: those asked for, or all. Raises ConfigError for an unknown."""
    has_weights = has_weight_metrics(model)
    known = [name for name, metric in METRICS.items() if metric.formula is not None or has_weights]
    if asked == "all":
        return tuple(known)
    try:
        names = tuple(dict.fromkeys(find_metric(name).name for name in asked))
    except ValueError as error:
        raise ConfigError(f"studies.{study}.metrics{str(error).removeprefix('metric')}") from error
    for name in names:
        if name not in known:
            raise ConfigError(
                f"studies.{study}.metrics: {name!r} needs experts' weights, which this model keeps elsewhere; leave it "
                "out"
            )
    return names


def _thinned(positions: Sequence[Positions], most: int | None, seed: int) -> list[Positions]:
    """At most so many of the positions of all sequences together, drawn without replacement."""
    total = sum(map(len, positions))
    if most is None or total <= most:
        return list(positions)
    kept = np.zeros(total, dtype=bool)
    kept[np.random.default_rng([seed, total]).choice(total, most, replace=False)] = True
    ends = np.cumsum([len(at) for at in positions])
    return [at[mask] for at, mask in zip(positions, np.split(kept, ends[:-1]), strict=True)]
