"""Rows of one layer of the effect table: written beside each other, read batch by batch or as a frame for a study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audit.effects import EFFECTS
from audit.runfolder import RunFolder

BATCH_ROWS = 1 << 17
# Whoever wrote which rows when: in this order nothing of it is left.
ORDER = ("layer", "unit", "intervention", "target", "parameter", "scope", "sequence", "position", "expert", "draw")


def by_layer(table: pa.Table) -> Iterator[pa.Table]:
    """The rows of each layer, ascending, otherwise in their order: as row groups of their own readers find them.

    Nothing is copied; tasks give their rows layer by layer. A table without layers comes as it is.
    """
    if "layer" not in table.column_names or not table.num_rows:
        yield table
        return
    layer_N = table["layer"].to_numpy()
    starts = np.flatnonzero(np.diff(layer_N, prepend=layer_N[0] - 1))
    runs: dict[int, list[pa.Table]] = {}
    for start, stop in zip(starts, [*starts[1:], len(layer_N)], strict=True):
        runs.setdefault(int(layer_N[start]), []).append(table.slice(start, stop - start))
    for layer in sorted(runs):
        yield pa.concat_tables(runs[layer])


@dataclass(frozen=True)
class EffectFiles:
    """The committed files of the effect table: ``url`` of the run folder, ``paths`` as its file system writes them."""

    url: str
    paths: Sequence[str]

    @cached_property
    def _filesystem(self) -> pa.fs.FileSystem:
        return RunFolder(self.url).arrow_filesystem()

    def layers(self) -> set[int]:
        """The layers that have rows. Where no row group holds two layers, no row is read."""
        found: set[int] = set()
        for file in self._opened():
            for group in range(file.num_row_groups):
                ends = _layers_of(file, group)
                if ends is not None and ends[0] == ends[1]:
                    found.add(ends[0])
                else:
                    found.update(pc.unique(file.read_row_group(group, columns=["layer"])["layer"]).to_pylist())
        return found

    def batches(self, layer: int, columns: Iterable[str]) -> Iterator[pa.Table]:
        """The rows of a layer in tables of at most ``BATCH_ROWS``; row groups that hold none of them are not read."""
        names = list(dict.fromkeys(["layer", *columns]))
        for file in self._opened():
            groups = [group for group in range(file.num_row_groups) if _may_hold(file, group, layer)]
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
                table = pa.Table.from_batches([batch])
                here = table.filter(pc.equal(table["layer"], layer))
                if here.num_rows:
                    yield here

    def frame(self, layer: int, columns: Iterable[str], only: pc.Expression) -> pd.DataFrame:
        """The rows of a layer that ``only`` keeps, words as categories, in :data:`ORDER`."""
        names = list(dict.fromkeys([*ORDER, *columns]))
        parts = [batch.filter(only).select(names) for batch in self.batches(layer, names)]
        table = pa.concat_tables([pa.schema([EFFECTS.field(name) for name in names]).empty_table(), *parts])
        frame: pd.DataFrame = table.unify_dictionaries().to_pandas()
        words = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
        for name in words:
            frame[name] = frame[name].cat.reorder_categories(sorted(frame[name].cat.categories))
        return frame.sort_values(list(ORDER), ignore_index=True)

    def _opened(self) -> Iterator[pq.ParquetFile]:
        for path in self.paths:
            with self._filesystem.open_input_file(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
                yield file


def _layers_of(file: pq.ParquetFile, group: int) -> tuple[int, int] | None:
    """The lowest and the highest layer of a row group; None where whoever wrote it did not say."""
    columns = file.metadata.row_group(group)
    place = {columns.column(i).path_in_schema: i for i in range(columns.num_columns)}["layer"]
    statistics = columns.column(place).statistics
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


def _may_hold(file: pq.ParquetFile, group: int, layer: int) -> bool:
    ends = _layers_of(file, group)
    return ends is None or ends[0] <= layer <= ends[1]
