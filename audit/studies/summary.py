"""Summary of an audit: what every layer and every expert does on average, and the noise floor it has to exceed.

Effects are averaged within (layer, unit, intervention, target, parameter, scope), never over them. Sums are exact: an
outcome is a 32-bit float, m 2^e with an integer m, so that adding the m of equal exponents in integers loses nothing.
Whatever the order in which rows arrive and however they are cut into tables, the result is the same to the last bit
(this project).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

CELL = ("layer", "unit", "intervention", "target", "parameter", "scope")
AVERAGED = ("kl", "delta_loss", "abs_delta_loss", "js", "tv", "top1_flip", "gap_norm")
COMPARED = ("kl", "delta_loss", "js", "tv")  # outcomes with a noise floor
NOISY = (*COMPARED, *(f"repeat_{name}" for name in COMPARED))  # columns that a noise floor is made of
NOISE_QUANTILE = 0.999

_KEYS = (*CELL, "expert")
_BUCKET_BITS = 3  # exponents are kept in buckets of 8: 24 + 7 bits per row leave room for 2**32 rows in 64
_FLOOR = pa.schema(
    [
        ("layer", pa.int16()),
        ("scope", pa.string()),
        ("outcome", pa.string()),
        ("rows", pa.int64()),
        ("quantile_999", pa.float64()),
        ("maximum", pa.float64()),
        ("routing_changed", pa.float64()),
        ("repeats", pa.int64()),
        ("repeat_quantile_999", pa.float64()),
        ("repeat_maximum", pa.float64()),
        ("repeats_rerouted", pa.int64()),
    ]
)
_PARTIAL = pa.schema(
    [
        ("layer", pa.int64()),
        ("unit", pa.string()),
        ("intervention", pa.string()),
        ("target", pa.string()),
        ("parameter", pa.float64()),
        ("scope", pa.string()),
        ("expert", pa.int64()),
        ("quantity", pa.string()),  # an outcome, or a count: rows, finite:, nonfinite:, compared:, below:<outcome>
        ("bucket", pa.int64()),
        ("total", pa.int64()),  # sum of integers; the outcome's sum is sum of total * 2**(8 * bucket - 24)
    ]
)


def noise_values(effects: pa.Table) -> pa.Table:
    """What numerics do in a part of an effect table: |outcome| of the identity rows, and |outcome of the repeat -
    outcome| of the repeated ones (``repeated`` true). Columns: layer, scope, repeated, the outcomes that have a floor.
    """
    identity = effects.filter(_is_identity(effects))
    repeated = effects.filter(effects["repeated"])
    parts = [
        (identity, {name: identity[name] for name in COMPARED}),
        (repeated, {name: pc.subtract(_wide(repeated[f"repeat_{name}"]), _wide(repeated[name])) for name in COMPARED}),
    ]
    return pa.concat_tables(
        pa.table(
            {
                "layer": pc.cast(rows["layer"], pa.int16()),
                "scope": pc.dictionary_encode(pc.cast(rows["scope"], pa.string())),
                "repeated": pa.repeat(rows is repeated, rows.num_rows),
            }
            | {name: pc.abs(_wide(values)) for name, values in found.items()}
        )
        for rows, found in parts
    )


def _is_identity(effects: pa.Table) -> pa.ChunkedArray:
    return pc.equal(pc.cast(effects["unit"], pa.string()), "identity")


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """The place of each row's word among :func:`_words`; -1 where it is null. Words themselves take 60 bytes each."""
    codes: np.ndarray = pc.fill_null(pc.cast(column.combine_chunks().indices, pa.int64()), -1).to_numpy()
    return codes


def _words(column: pa.ChunkedArray) -> list[str]:
    """The words of a column whose chunks share their dictionary."""
    return list(column.chunk(0).dictionary.to_pylist()) if column.num_chunks else []


def _wide(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(values, pa.float64())


def noise_floor(values: Iterable[pa.Table], routing_changes: Iterable[Mapping[int, Sequence[int]]]) -> pa.Table:
    """What numerics alone do: per layer, scope and outcome the 99.9 % quantile and the maximum over identity rows, and
    the same two of |outcome of a repeat - outcome of the effect it repeats|.

    ``values``: :func:`noise_values` of every part, all held in memory (40 bytes per such row, 80 while it is worked
    on). ``routing_changes``: per task {layer: (identity rows, those whose expert sets changed above)}; their share is
    ``routing_changed`` (null where no such row was run). ``repeats_rerouted`` counts the repeats without an outcome,
    because the other rounding routed their token to other experts.
    """
    table = pa.concat_tables(values).unify_dictionaries()
    layer_N, repeated_N, scopes = table["layer"].to_numpy(), table["repeated"].to_numpy(), _words(table["scope"])
    scope_N = _codes(table["scope"])
    checked: dict[int, np.ndarray] = {}
    for changes in routing_changes:
        for layer, counts in changes.items():
            checked[int(layer)] = checked.get(int(layer), np.zeros(2, np.int64)) + np.asarray(counts, np.int64)
    records: list[dict[str, Any]] = []
    for layer, scope in product(np.unique(layer_N).tolist(), sorted(scopes)):
        here_N = (layer_N == layer) & (scope_N == scopes.index(scope))
        if not here_N.any():
            continue
        for outcome in COMPARED:
            value_N = table[outcome].to_numpy()  # null is nan
            found, repeats = (_finite(value_N[here_N & (repeated_N == which)]) for which in (False, True))
            seen, changed = checked.get(layer, (0, 0))
            records.append(
                {
                    "layer": layer,
                    "scope": scope,
                    "outcome": outcome,
                    "rows": found.size,
                    **_extremes(found, "quantile_999", "maximum"),
                    "routing_changed": float(changed / seen) if seen else None,
                    "repeats": repeats.size,
                    **_extremes(repeats, "repeat_quantile_999", "repeat_maximum"),
                    "repeats_rerouted": int(np.isnan(table["kl"].to_numpy()[here_N & repeated_N]).sum()),
                }
            )
    return pa.Table.from_pylist(records, _FLOOR)


def _finite(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[np.isfinite(values)]
    return found


def _extremes(values: np.ndarray, quantile: str, maximum: str) -> dict[str, float | None]:
    """The noise quantile and the maximum, by the names given; None of nothing."""
    if not values.size:
        return {quantile: None, maximum: None}
    return {quantile: float(np.quantile(values, NOISE_QUANTILE)), maximum: float(values.max())}


def partial_sums(effects: pa.Table, floor: pa.Table) -> pa.Table:
    """Exact sums over one part of an effect table, for :func:`merge`; ``floor`` is the table of :func:`noise_floor`.

    Identity rows are left out: they measure the noise floor, not an effect. Memory: some 200 bytes per row.
    """
    effects = effects.filter(pc.invert(_is_identity(effects)))
    if not effects.num_rows:
        return _PARTIAL.empty_table()
    group_N, keys = _groups(effects)
    names: list[str] = []
    quantities: list[np.ndarray] = []
    places: list[np.ndarray] = []
    totals: list[np.ndarray] = []
    buckets: list[np.ndarray] = []

    def add(quantity: str, total_N: np.ndarray, bucket_N: np.ndarray | None = None) -> None:
        lowest, highest = (int(bucket_N.min()), int(bucket_N.max())) if bucket_N is not None else (0, 0)
        width = highest - lowest + 1
        sums = np.zeros(keys.num_rows * width, np.int64)
        np.add.at(sums, group_N * width + (0 if bucket_N is None else bucket_N - lowest), total_N.astype(np.int64))
        kept = np.flatnonzero(sums)
        places.append(kept // width)
        buckets.append(kept % width + lowest)
        totals.append(sums[kept])
        quantities.append(np.full(len(kept), len(names)))
        names.append(quantity)

    add("rows", np.ones(len(group_N)))
    for name in AVERAGED:
        column = effects["delta_loss" if name == "abs_delta_loss" else name]
        value_N = pc.cast(column, pa.float32()).to_numpy().astype(np.float64)  # null becomes nan
        value_N = np.abs(value_N) if name == "abs_delta_loss" else value_N
        finite_N = np.isfinite(value_N)
        add(f"finite:{name}", finite_N)
        add(f"nonfinite:{name}", pc.is_valid(column).to_numpy() & ~finite_N)
        bucket_N, integer_N = _integers(np.where(finite_N, value_N, 0.0))
        add(name, integer_N, bucket_N)
        if name in COMPARED:
            quantile_N = _floor_of(floor, name, keys)[group_N]
            add(f"compared:{name}", finite_N & ~np.isnan(quantile_N))
            add(f"below:{name}", np.abs(value_N) < quantile_N)  # nan is below nothing
    columns = {name: keys[name].take(pa.array(np.concatenate(places))) for name in _KEYS}
    columns |= {"quantity": pa.array(names).take(pa.array(np.concatenate(quantities)))}
    columns |= {"bucket": pa.array(np.concatenate(buckets)), "total": pa.array(np.concatenate(totals))}
    return pa.table(columns).cast(_PARTIAL)


def _groups(effects: pa.Table) -> tuple[np.ndarray, pa.Table]:
    """The number of each row's group, and the groups' keys; null is a key like any other."""
    number_N = np.zeros(effects.num_rows, np.int64)
    for name in _KEYS:
        column = effects[name].unify_dictionaries()
        is_word = pa.types.is_dictionary(column.type)
        code_N = _codes(column) if is_word else pd.factorize(column.to_numpy())[0]  # null is -1
        number_N = pd.factorize(number_N * (int(code_N.max()) + 2) + code_N + 1)[0]  # below rows x codes: no overflow
    member = np.zeros(int(number_N.max()) + 1, np.int64)
    member[number_N] = np.arange(len(number_N))
    rows = effects.select(_KEYS).take(pa.array(member))
    return number_N, pa.table({name: pc.cast(rows[name], _PARTIAL.field(name).type) for name in _KEYS})


def merge(partials: Iterable[pa.Table]) -> pa.Table:
    """One table of exact sums from those of the parts; integers, so that neither order nor cut matters."""
    everything = pa.concat_tables([_PARTIAL.empty_table(), *partials])
    return _sum_up(everything, [*_KEYS, "quantity", "bucket"])


def layer_summary(merged: pa.Table) -> pa.Table:
    """Means per cell; columns as :func:`expert_summary`, with ``experts``, how many occur, for ``expert``."""
    rows = merged.filter(pc.equal(merged["quantity"], "rows"))
    experts = rows.group_by([*CELL]).aggregate([("expert", "count_distinct")])
    counted = {tuple(row[key] for key in CELL): row["expert_count_distinct"] for row in experts.to_pylist()}
    table = _summary(_sum_up(merged, [*CELL, "quantity", "bucket"]), CELL)
    found = [counted[tuple(row[key] for key in CELL)] for row in table.select(list(CELL)).to_pylist()]
    return table.add_column(len(CELL), "experts", pa.array(found, pa.int32()))


def expert_summary(merged: pa.Table) -> pa.Table:
    """Means per expert, where the unit is one expert.

    Columns: the cell; ``expert``; ``n``: rows; ``n_delta_loss``: those with a true next token; ``nonfinite``: values
    that were infinite or nan and are in no mean; ``mean_<outcome>``: nats for kl, js and the losses, the share of rows
    for ``top1_flip``; ``share_below_noise_<outcome>``: the share of rows whose |outcome| is below the layer's 99.9 %
    noise quantile; ``below_noise_<outcome>``: more than half are, so that the median effect is noise. The last two are
    null where there is no floor.
    """
    one = merged.filter(pc.equal(merged["unit"], "expert"))
    return _summary(one, (*CELL, "expert"))


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """32-bit floats as (bucket, integer): value = integer * 2**(8 * bucket - 24), exactly."""
    mantissa, exponent = np.frexp(values)
    integer = (mantissa * 2.0**24).astype(np.int64)
    return (exponent >> _BUCKET_BITS).astype(np.int64), integer << (exponent & (2**_BUCKET_BITS - 1))


def _mean(buckets: Mapping[int, int], count: int) -> float | None:
    """The correctly rounded mean of a sum kept in buckets."""
    if not count:
        return None
    parts = (total * Fraction(2) ** ((bucket << _BUCKET_BITS) - 24) for bucket, total in buckets.items())
    return float(sum(parts, Fraction(0)) / count)


def _sum_up(table: pa.Table, keys: list[str]) -> pa.Table:
    sums = table.group_by(keys, use_threads=False).aggregate([("total", "sum")])
    return sums.rename_columns([*keys, "total"])


def _floor_of(floor: pa.Table, outcome: str, groups: pa.Table) -> np.ndarray:
    """The noise quantile that belongs to each group; nan where there is none."""
    known = {
        (row["layer"], row["scope"]): row["quantile_999"]
        for row in floor.to_pylist()
        if row["outcome"] == outcome and row["quantile_999"] is not None
    }
    places = zip(groups["layer"].to_pylist(), groups["scope"].to_pylist(), strict=True)
    return np.array([known.get(place, np.nan) for place in places], np.float64)


def _summary(sums: pa.Table, keys: Sequence[str]) -> pa.Table:
    frame = sums.select([*keys, "quantity", "bucket", "total"]).to_pandas()
    records = []
    for values, rows in frame.groupby(list(keys), dropna=False, sort=True):
        quantities: dict[str, dict[int, int]] = {}
        for quantity, bucket, total in zip(rows["quantity"], rows["bucket"], rows["total"], strict=True):
            quantities.setdefault(quantity, {})[int(bucket)] = int(total)
        count = Counter({name: buckets[0] for name, buckets in quantities.items() if ":" in name or name == "rows"})
        cell = zip(keys, values, strict=True)
        record: dict[str, Any] = {key: None if pd.isna(value) else value for key, value in cell}
        record["n"] = count["rows"]
        record["n_delta_loss"] = count["finite:delta_loss"]
        record["nonfinite"] = sum(count[f"nonfinite:{name}"] for name in AVERAGED if name != "abs_delta_loss")
        for name in AVERAGED:
            record[f"mean_{name}"] = _mean(quantities.get(name, {}), count[f"finite:{name}"])
        for name in COMPARED:
            compared = count[f"compared:{name}"]
            below = count[f"below:{name}"] / compared if compared else None
            record[f"share_below_noise_{name}"] = below
            record[f"below_noise_{name}"] = None if below is None else below > 0.5
        records.append(record)
    return pa.Table.from_pylist(records, _summary_schema(keys))


def _summary_schema(keys: Sequence[str]) -> pa.Schema:
    types = {"layer": pa.int16(), "expert": pa.int16(), "parameter": pa.float32()}
    fields = [(key, types.get(key, pa.string())) for key in keys]
    fields += [("n", pa.int64()), ("n_delta_loss", pa.int64()), ("nonfinite", pa.int64())]
    fields += [(f"mean_{name}", pa.float64()) for name in AVERAGED]
    fields += [(f"share_below_noise_{name}", pa.float64()) for name in COMPARED]
    fields += [(f"below_noise_{name}", pa.bool_()) for name in COMPARED]
    return pa.schema(fields)
