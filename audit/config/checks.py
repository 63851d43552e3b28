"""What a specification asks for against what a model is: the checks that need the model's description."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from audit.config.mistakes import ConfigError
from audit.config.specification import AuditConfig

if TYPE_CHECKING:
    from audit.models.description import ModelDescription


def check_against(config: AuditConfig, description: ModelDescription) -> None:
    """Raise ConfigError, one sentence, where this model cannot be audited as specified."""
    audited_layers(config, description)
    check_length(config.corpus.max_tokens, description.context_limit)
    for index, intervention in enumerate(config.build_interventions()):
        try:
            intervention.check(description.top_k, description.experts, description.shared_experts)
        except ValueError as error:
            raise ConfigError(f"interventions.{index}{str(error).removeprefix('intervention')}") from error
    if config.engine.method == "sweep" and description.engine == "oracle":
        reason = description.engine_reason
        raise ConfigError(f"engine.method: 'sweep' is not exact for this model ({reason}); use auto or oracle")


def audited_layers(config: AuditConfig, description: ModelDescription) -> tuple[int, ...]:
    """The layers to audit, ascending. Raises ConfigError for one that is not an MoE layer of the model."""
    if config.layers == "all":
        return description.moe_layers
    for layer in config.layers:
        if layer not in description.moe_layers:
            known = ranges(description.moe_layers)
            raise ConfigError(
                f"layers: {layer} is not an MoE layer of {description.source!r}, whose MoE layers are {known}"
            )
    return tuple(sorted(config.layers))


def check_length(max_tokens: int, context_limit: int | None) -> None:
    """Raise ConfigError where sequences of ``max_tokens`` are longer than the model accepts (None: it has no limit)."""
    if context_limit is not None and max_tokens > context_limit:
        raise ConfigError(
            f"corpus.max_tokens: {max_tokens} is more than the model accepts; use at most {context_limit}"
        )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: ``1-26`` or ``0, 4-7``."""
    return ", ".join(_runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterator[str]:
    # Consecutive numbers have the same distance from their place in the list.
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
