"""Effects of chosen experts, layers, positions and interventions on given text, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from audit.calibration import Calibration
from audit.corpus import TokenSequence
from audit.engine import Engine
from audit.interventions import Intervention, Scope, Target
from audit.models import MoEModel

Text = str | Sequence[int]


def measure(
    model: MoEModel,
    text: Text | Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    interventions: Sequence[Intervention] | None = None,
    scope: Scope = "token",
    calibration: Calibration | None = None,
    memory: int | None = None,
) -> pa.Table:
    """The effect table of interventions on ``text`` (a string, token ids, or several of either);
    ``.to_pandas()`` reads it.

    By default every active expert is removed by itself (``zero``) at every MoE layer and position. ``experts``
    restricts that to some ids; ``interventions`` replaces it, and then carries its own targets. ``positions`` are
    token positions, the same in every text. ``memory`` in bytes: a budget, as ``engine.memory`` of a configuration;
    None: what that takes by itself. Columns: docs/tables.md. Raises ValueError for
    what cannot be measured.
    """
    if experts is not None and interventions is not None:
        raise ValueError(
            "experts: interventions carry their own targets; give Target('each', experts=...) there instead"
        )
    target = Target("each", experts=tuple(experts)) if experts is not None else Target()
    read = sequences(model, text)
    at = [_positions(len(s), positions) for s in read]
    engine = Engine(model, memory=memory)
    measured = engine.measure(
        read,
        at,
        layers=model.description.moe_layers if layers is None else layers,
        interventions=[Intervention("zero", target)] if interventions is None else interventions,
        scope=scope,
        calibration=calibration,
    )
    return measured.effects


def calibrate(model: MoEModel, text: Text | Sequence[Text], *, stored_outputs: int = 256, seed: int = 0) -> Calibration:
    """Observations of the experts on ``text``, for the metrics and for ``mean`` and ``resample`` interventions."""
    return Engine(model, memory=2**62, seed=seed).observe(sequences(model, text), stored_outputs=stored_outputs)


def sequences(model: MoEModel, text: Text | Sequence[Text], domain: str = "text") -> list[TokenSequence]:
    """Strings or token ids as the sequences that an :class:`~audit.engine.Engine` takes, one document each."""
    single = isinstance(text, str) or not len(text) or (not isinstance(text[0], str) and np.ndim(text[0]) == 0)
    several = [text] if single else list(text)
    return [_sequence(model, number, one, domain) for number, one in enumerate(several)]  # type: ignore[arg-type]


def _sequence(model: MoEModel, number: int, text: Text, domain: str) -> TokenSequence:
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError("text: this model has no tokenizer; give token ids")
        ids = np.asarray(model.tokenizer(text)["input_ids"], dtype=np.int64)
    else:
        ids = np.asarray(text, dtype=np.int64)
    vocabulary = model.description.vocabulary
    if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"text: {len(ids)} token ids; at least one is needed, each from 0 to {vocabulary - 1}")
    special = np.isin(ids, list(getattr(model.tokenizer, "all_special_ids", [])))
    return TokenSequence(number, number, domain, ids, np.zeros(len(ids), dtype=np.int32), special)


def _positions(length: int, wanted: Sequence[int] | None) -> NDArray[np.int64]:
    if wanted is None:
        return np.arange(length)
    at = np.unique(np.asarray(wanted, dtype=np.int64))
    if len(at) and (at[0] < 0 or at[-1] >= length):
        raise ValueError(
            f"positions: {at[-1] if at[0] >= 0 else at[0]} is not a position; the text has 0 to {length - 1}"
        )
    return at
