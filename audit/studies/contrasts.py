"""Contrasts: the public table of pairs, from which cells and pooled lines follow, whoever measured the effects.

A row is one token of one cell: the effect of the active expert that the metric ranks highest and of the one it ranks
lowest. docs/tables.md describes every column.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from audit.statistics.cells import CELL, Pairs, Settings, cell_row, cell_table
from audit.statistics.pooled import POOLED, LayerPairs, pooled_row, pooled_table

TEXTS = ("model", "metric", "outcome", "intervention", "scope", "label")
INTEGERS = ("layer", "sequence", "position", "expert_high", "expert_low")
NUMBERS = ("effect_high", "effect_low")
DEFAULTS: Mapping[str, str | int] = {"intervention": "zero", "scope": "token", "label": "published", "sequence": 0}
TOKEN = ("document", "sequence", "position")
COLUMNS = (*CELL, "label", *TOKEN, "expert_high", "expert_low", "effect_high", "effect_low")
TIED = -1  # expert of an end at which several are tied; null in the table

_INTEGER = r"^\s*[+-]?[0-9]{1,18}(\.0*)?\s*$"
_NUMBER = r"^\s*[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|NaN|NAN|inf|Inf|INF|[Ii]nfinity)\s*$"


class ContrastError(ValueError):
    """A table that cannot be read as contrasts; the message names the file, the column, the row and what is right."""


def read_contrasts(path: str | Path) -> pd.DataFrame:
    """Contrasts from a Parquet or CSV file: the columns ``COLUMNS``, sorted by them.

    Optional columns are filled with ``DEFAULTS``; experts are int64 with ``TIED`` where null; documents are int64, or
    text where one of them is no integer; effects are float64, nan where missing (a cell counts and drops them).
    Raises ContrastError with one sentence; rows are counted from 1 without the header and without empty lines.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".csv":
            table = _read_csv(path)
        case ".parquet":
            table = _read_parquet(path)
        case suffix:
            raise ContrastError(
                f"{path.name}: {suffix or 'a name without ending'} cannot be read; name a .csv or .parquet file"
            )
    return _checked(table, path.name)


def cells_of(contrasts: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The cell table (``audit.statistics.cells``) of contrasts as :func:`read_contrasts` gives them.

    Metrics have orientation 1: whoever made the pairs turned them. Without the metric's values there is no
    p_permutation, and without identity rows no noise floor; both are said in ``notes``.
    """
    rows = (
        cell_row(pairs.pairs, dict(zip((*CELL, "label"), key, strict=True)), settings)
        for key, pairs in _cells(contrasts)
    )
    return cell_table(rows, settings)


def pooled_of(contrasts: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The pooled table (``audit.statistics.pooled``) of contrasts as :func:`read_contrasts` gives them."""
    lines: dict[tuple[Any, ...], dict[int, LayerPairs]] = {}
    keys: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values, pairs in _cells(contrasts):
        key = dict(zip((*CELL, "label"), values, strict=True))
        line = tuple(key[name] for name in POOLED)
        lines.setdefault(line, {})[key.pop("layer")] = pairs
        keys.setdefault(line, key)
    return pooled_table(pooled_row(layers, keys[line], settings) for line, layers in lines.items())


def write_cells(frame: pd.DataFrame, folder: str | Path) -> tuple[Path, Path]:
    """Write ``cells.parquet`` and ``cells.csv``; the same frame gives the same bytes. A file is there whole or not."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parquet, text = folder / "cells.parquet", folder / "cells.csv"
    for path in (parquet, text):
        part = path.with_name(f".{path.name}.{os.getpid()}")
        if path == parquet:
            pyarrow.parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), part)
        else:
            frame.to_csv(part, index=False, lineterminator="\n")
        part.replace(path)
    return parquet, text


def _cells(contrasts: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], LayerPairs]]:
    """(values of CELL and label, pairs) of every cell. Tokens are numbered over the whole table, in its order."""
    documents = contrasts.groupby("document", sort=True).ngroup().to_numpy().astype(np.int64)
    tokens = contrasts.groupby(list(TOKEN), sort=True).ngroup().to_numpy().astype(np.int64)
    for key, rows in contrasts.groupby([*CELL, "label"], sort=True).indices.items():
        assert isinstance(key, tuple)
        part = contrasts.iloc[rows]
        pairs = Pairs(
            high_N=part["effect_high"].to_numpy(np.float64),
            low_N=part["effect_low"].to_numpy(np.float64),
            document_N=documents[rows],
            expert_high_N=part["expert_high"].to_numpy(np.int64),
            expert_low_N=part["expert_low"].to_numpy(np.int64),
        )
        yield key, LayerPairs(token_N=tokens[rows], pairs=pairs)


# Reading -------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> pa.Table:
    """Every column as text: types are ours to check, so that a mistake is told with its row."""
    ragged: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    try:
        with path.open("rb") as file:
            names = file.readline().decode().strip().lstrip("\ufeff").split(",")
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # otherwise rows have no number
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=note),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name.strip().strip('"'): pa.string() for name in names},
                strings_can_be_null=True,
                null_values=["", "null", "NULL", "None", "NA", "<NA>"],
            ),
        )
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ContrastError(f"{path.name}: cannot be read as CSV ({' '.join(str(error).split())})") from error
    if ragged:
        first = ragged[0]
        raise ContrastError(
            f"{path.name}: row {first.number - 1} has {first.actual_columns} fields; "
            f"the header names {first.expected_columns} columns"
        )
    return table


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ContrastError(f"{path.name}: cannot be read as Parquet ({' '.join(str(error).split())})") from error


# Checking ------------------------------------------------------------------------------------------------------------


def _checked(table: pa.Table, name: str) -> pd.DataFrame:
    for column in table.column_names:
        if column not in COLUMNS:
            near = get_close_matches(column, COLUMNS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ContrastError(f"{name}: unknown column {column!r}{hint}; known columns are {', '.join(COLUMNS)}")
        if table.column_names.count(column) > 1:
            raise ContrastError(f"{name}: column {column} occurs twice; each stands once")
    absent = [column for column in COLUMNS if column not in table.column_names and column not in DEFAULTS]
    if absent:
        raise ContrastError(f"{name}: column {absent[0]} is missing; a contrast table has {', '.join(COLUMNS)}")
    if not table.num_rows:
        raise ContrastError(f"{name}: holds no rows; a contrast table has a row per token of a cell")
    frame = pd.DataFrame(index=pd.RangeIndex(table.num_rows))
    for column in COLUMNS:
        where = f"{name}: column {column}"
        if column not in table.column_names:
            frame[column] = DEFAULTS[column]
            continue
        values = table[column].combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if column == "document":
            frame[column] = _documents(values, where)
        elif column in TEXTS:
            frame[column] = _texts(values, where)
        elif column in INTEGERS:
            frame[column] = _integers(values, where, null=TIED if column.startswith("expert") else None)
        else:
            frame[column] = _numbers(values, where)
    _refuse_twice(frame, name)
    return frame.sort_values(list(COLUMNS), ignore_index=True)


def _texts(values: pa.Array, where: str) -> np.ndarray:
    if not _is_text(values.type):
        raise ContrastError(f"{where}: holds {values.type}; it takes text")
    _refuse(
        pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), ""),
        values,
        where,
        "it takes a text that is not empty",
    )
    return _numpy(values)


def _integers(values: pa.Array, where: str, null: int | None) -> np.ndarray:
    """int64, at least 0; nulls become ``null``, or are refused where there is none for them."""
    right = "it takes a whole number of at least 0" + (
        "" if null is None else ", or nothing where several experts tied"
    )
    if null is None:
        _refuse(pc.is_null(values), values, where, right)
    if _is_text(values.type):
        _refuse(pc.invert(pc.match_substring_regex(values, _INTEGER)), values, where, right)
        digits = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), r"^\+|\.0*$", "")
        numbers = pc.cast(digits, pa.int64())
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        whole = pc.cast(values, pa.float64())
        _refuse(
            pc.invert(pc.and_(pc.equal(pc.floor(whole), whole), pc.less(pc.abs(whole), 2.0**53))), values, where, right
        )
        numbers = pc.cast(values, pa.int64())
    else:
        raise ContrastError(f"{where}: holds {values.type}; it takes whole numbers")
    _refuse(pc.less(numbers, 0), values, where, right)
    return _numpy(pc.fill_null(numbers, null) if null is not None else numbers).astype(np.int64)


def _numbers(values: pa.Array, where: str) -> np.ndarray:
    """float64; null becomes nan."""
    if _is_text(values.type):
        right = "it takes a number (nan or nothing where there is none)"
        _refuse(pc.invert(pc.match_substring_regex(values, _NUMBER)), values, where, right, shown="is not a number")
        return np.array([np.nan if text is None else float(text) for text in values.to_pylist()])
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ContrastError(f"{where}: holds {values.type}; it takes numbers")
    return _numpy(pc.cast(values, pa.float64(), safe=False)).astype(np.float64)


def _documents(values: pa.Array, where: str) -> np.ndarray:
    """Numbers where every document is written as a whole number, texts otherwise: the same from CSV and Parquet."""
    _refuse(pc.is_null(values), values, where, "it takes the number or name of a document")
    if pa.types.is_floating(values.type):
        return _integers(values, where, null=None)
    if not (_is_text(values.type) or pa.types.is_integer(values.type)):
        raise ContrastError(f"{where}: holds {values.type}; it takes numbers or names of documents")
    texts = pc.cast(values, pa.string())
    plain = pc.all(pc.match_substring_regex(texts, r"^(0|-?[1-9][0-9]{0,17})$")).as_py()
    return _numpy(pc.cast(texts, pa.int64()) if plain else texts)


def _refuse_twice(frame: pd.DataFrame, name: str) -> None:
    """No token twice in a cell, and no cell under two labels."""
    key = [*CELL, *TOKEN]
    twice = np.flatnonzero(frame.duplicated(key))
    if len(twice):
        row = frame.iloc[twice[0]]
        first = np.flatnonzero((frame[key] == row[key]).all(axis=1))[0]
        raise ContrastError(
            f"{name}: column position, row {twice[0] + 1}: {row['position']} of document {row['document']}, sequence "
            f"{row['sequence']}, stands in row {first + 1} already; a token is in a cell once"
        )
    labels = frame.groupby(list(CELL))["label"].transform("first")
    other = np.flatnonzero(frame["label"] != labels)
    if len(other):
        raise ContrastError(
            f"{name}: column label, row {other[0] + 1}: {frame['label'].iloc[other[0]]!r}, but other rows of this cell "
            f"say {labels.iloc[other[0]]!r}; a cell has one label"
        )


def _refuse(bad: pa.Array, values: pa.Array, where: str, right: str, *, shown: str = "cannot be used") -> None:
    """Raise ContrastError with the first row where ``bad`` is true; null is not bad."""
    rows = np.flatnonzero(pc.fill_null(bad, False).to_numpy(zero_copy_only=False))
    if not len(rows):
        return
    value = values[int(rows[0])].as_py()
    told = "is empty" if value is None else f"{value!r} {shown}"
    raise ContrastError(f"{where}, row {rows[0] + 1}: {told}; {right}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _numpy(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False))
