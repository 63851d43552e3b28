"""Results of an engine as Arrow tables of the public schemas (audit.effects)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.corpus import TokenSequence
from audit.effects import EFFECTS, REDISTRIBUTION, REPEATED, TOKENS
from audit.engine.result import Effects, Request, Result


def effect_table(result: Result, request: Request, sequences: Sequence[TokenSequence]) -> pa.Table:
    """Rows of the effect table, layer by layer, identity controls with unit ``identity``."""
    document_T = np.concatenate([np.full(len(s.token_ids), s.document, dtype=np.int32) for s in sequences])
    sequence_T, position_T = (_numpy(column) for column in request.token_T)
    outcomes = {
        name: _numpy(getattr(result.outcomes, name))
        for name in ("delta_loss", "kl", "js", "tv", "top1_flip", "delta_logit")
    }
    repeated, repeats = _repeats(result)
    parts: list[pa.Table] = []
    first = 0
    for effect in result.effects:
        rows = slice(first, first + len(effect.worlds))
        parent = _numpy(effect.worlds.parent_P)
        columns = {
            "document": pa.array(document_T[parent]),
            "sequence": pa.array(sequence_T[parent].astype(np.int32)),
            "position": pa.array(position_T[parent].astype(np.int32)),
            **_what_was_done(effect, request.scope),
            **{name: _column(values[rows], EFFECTS.field(name).type) for name, values in outcomes.items()},
            "repeated": pa.array(repeated[rows]),
            **{name: _column(values[rows], pa.float32()) for name, values in repeats.items()},
        }
        parts.append(pa.table([columns[field.name] for field in EFFECTS], schema=EFFECTS))
        first = rows.stop
    return pa.concat_tables(parts).combine_chunks() if parts else EFFECTS.empty_table()


def token_table(result: Result, request: Request, sequences: Sequence[TokenSequence]) -> pa.Table:
    """Rows of the tokens table for the audited tokens."""
    rows = _numpy(request.rows_M)

    def audited(columns: list[NDArray[Any]]) -> NDArray[Any]:
        values: NDArray[Any] = np.concatenate(columns)[rows]
        return values

    target = _numpy(result.baseline.target_M)
    domains = audited([np.full(len(s.token_ids), s.domain) for s in sequences])
    columns = {
        "document": audited([np.full(len(s.token_ids), s.document, dtype=np.int32) for s in sequences]),
        "sequence": audited([np.full(len(s.token_ids), s.index, dtype=np.int32) for s in sequences]),
        "position": audited([np.arange(len(s.token_ids), dtype=np.int32) for s in sequences]),
        "sentence": audited([s.sentence.astype(np.int32) for s in sequences]),
        "token_id": audited([s.token_ids.astype(np.int32) for s in sequences]),
        "baseline_entropy": _numpy(result.baseline.entropy_M).astype(np.float32),
    }
    arrays = {name: pa.array(values) for name, values in columns.items()}
    arrays["domain"] = pa.array(domains.tolist(), pa.string()).cast(TOKENS.field("domain").type)
    arrays["target_id"] = pa.array(target.astype(np.int32), mask=target < 0)
    arrays["baseline_loss"] = _column(_numpy(result.baseline.loss_M), pa.float32())
    return pa.table([arrays[field.name] for field in TOKENS], schema=TOKENS)


def _repeats(result: Result) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.float32]]]:
    """Which rows were chosen to be repeated, and the outcomes of the repeats in the rows of their effects."""
    size, repeats = len(result.outcomes.kl), result.repeats
    chosen = np.zeros(size, dtype=np.bool_)
    columns = {f"repeat_{name}": np.full(size, np.nan, dtype=np.float32) for name in REPEATED}
    if repeats is not None:
        chosen[repeats.chosen] = True
        for name in REPEATED:
            columns[f"repeat_{name}"][repeats.found] = _numpy(getattr(repeats.outcomes, name))
    return chosen, columns


def _what_was_done(effect: Effects, scope: str) -> dict[str, pa.Array]:
    worlds, intervention, remains = effect.worlds, effect.worlds.intervention, effect.redistribution
    size = len(worlds)
    selection, target = intervention.target.selection, intervention.target.name
    unit = "identity" if worlds.identity else {"each": "expert", "shared": "shared"}.get(selection, "set")
    parameter = intervention.factor if intervention.kind == "scale" else intervention.target.count
    routed = unit in ("expert", "set")
    no_weight = np.full(size, not routed)
    return {
        "layer": pa.array(np.full(size, effect.layer, dtype=np.int16)),
        "unit": _word(unit, size, "unit"),
        "expert": _masked(_numpy(worlds.expert_P), pa.int16()),
        "experts": _sets(effect) if unit == "set" else pa.nulls(size, EFFECTS.field("experts").type),
        "slot": _masked(_numpy(worlds.slot_P), pa.int8()),
        "intervention": _word(intervention.kind, size, "intervention"),
        "target": pa.nulls(size, EFFECTS.field("target").type) if worlds.identity else _word(target, size, "target"),
        "parameter": pa.nulls(size, pa.float32())
        if parameter is None
        else pa.array(np.full(size, parameter, dtype=np.float32)),
        "draw": pa.array(_numpy(worlds.draw_P).astype(np.int16)) if intervention.drawn else pa.nulls(size, pa.int16()),
        "scope": _word(scope, size, "scope"),
        "routing_weight": pa.array(_numpy(effect.routing_weight_P).astype(np.float32), mask=no_weight),
        "contribution_norm": _column(_numpy(effect.contribution_norm_P), pa.float32()),
        "gap_norm": _column(_numpy(effect.gap_norm_P), pa.float32()),
        "attribution": _asked(effect.attribution_P, size),
        **{name: _asked(None if remains is None else getattr(remains, name), size) for name in REDISTRIBUTION},
    }


def _asked(values_P: Tensor | None, size: int) -> pa.Array:
    return pa.nulls(size, pa.float32()) if values_P is None else _column(_numpy(values_P), pa.float32())


def _sets(effect: Effects) -> pa.Array:
    """The experts acted upon, as a list per row in slot order."""
    members = _numpy(effect.worlds.members_PK)
    offsets = np.concatenate([[0], members.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_numpy(effect.experts_PK)[members].astype(np.int16)))


def _word(word: str, size: int, field: str) -> pa.Array:
    index_type = EFFECTS.field(field).type.index_type
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(size), index_type), pa.array([word]))


def _masked(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, mask=values < 0).cast(kind)


def _column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Numbers with nan as null."""
    return (
        pa.array(values)
        if values.dtype == np.bool_
        else pa.array(values.astype(np.float32), mask=np.isnan(values)).cast(kind)
    )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    values: NDArray[Any] = tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.numpy()
    return values
