"""Read documents from text files, JSON Lines, Parquet and Arrow, Hugging Face ``datasets`` and the demo's own text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audit.config import (
    ConfigError,
    CorpusConfig,
    DatasetsSource,
    DemoSource,
    JsonlSource,
    ParquetSource,
    TextSource,
)
from audit.corpus.files import Found, SourceFile, find_files
from audit.demo.text import held_out
from audit.documents import Document

# Which files of a folder are read, by the source's kind; None for all.
SUFFIXES: Mapping[str, tuple[str, ...] | None] = {
    "text": None,
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson"),
    "parquet": (".parquet", ".arrow", ".feather"),
}

AnySource = DemoSource | TextSource | JsonlSource | ParquetSource | DatasetsSource
RowSource = JsonlSource | ParquetSource | DatasetsSource


def read_documents(config: CorpusConfig, folder: Path) -> tuple[list[Document], Counter[str]]:
    """The documents of all sources in their order, filtered, and counts of what was read and left out.

    Paths are relative to the folder. A document of at most ``min_characters`` characters, white space at its ends not
    counted, is left out; then the first ``first`` are taken and reading stops.

    Raises ConfigError for a path that is not there, a file that cannot be read, a missing field, and a source that
    gives no document at all.
    """
    counts: Counter[str] = Counter()
    fields = [f"corpus.sources.{number}" for number in range(len(config.sources))]
    # All files are looked up before any is read: a typo in the last path should not cost the reading of the first.
    streams = [_stream(s, field, folder, counts) for s, field in zip(config.sources, fields, strict=True)]
    documents: list[Document] = []
    for source, field, stream in zip(config.sources, fields, streams, strict=True):
        taken = read = longest = 0
        for document in stream:
            read += 1
            characters = len(document.text.strip())
            longest = max(longest, characters)
            if characters <= source.min_characters:
                counts["too_short"] += 1
                continue
            documents.append(document)
            taken += 1
            if taken == source.first:
                break
        counts["read"] += read
        if not longest:
            raise ConfigError(f"{field}: its {read} documents hold no text; name a source that holds some")
        if not taken:
            raise ConfigError(
                f"{field}.min_characters: {source.min_characters} leaves none of the {read} documents of this source, "
                f"the longest of {longest} characters; use a smaller number, or a source with longer texts"
            )
    counts["duplicates"] = len(documents) - len({document.text for document in documents})
    return documents, counts


def _stream(source: AnySource, field: str, folder: Path, counts: Counter[str]) -> Iterator[Document]:
    if isinstance(source, DemoSource):
        return _demo(source, field, counts)
    if isinstance(source, DatasetsSource):
        return _datasets(source, field, folder)
    found = find_files(source.path, folder, f"{field}.path", SUFFIXES[source.kind])
    counts["hidden_files"] += found.hidden
    counts["other_files"] += found.other
    if isinstance(source, TextSource):
        return _text(source, field, found)
    rows = _json_rows(field, found) if isinstance(source, JsonlSource) else _arrow_rows(source, field, found)
    return _row_documents(source, field, rows)


def _demo(source: DemoSource, field: str, counts: Counter[str]) -> Iterator[Document]:
    try:
        held = held_out(source.domains, source.documents_per_domain, source.seed)
    except ValueError as error:
        raise ConfigError(f"{field}.{error}") from error
    counts["demo_overlapping"] += sum(held.dropped.values())
    counts["demo_shortened"] += sum(held.shortened.values())
    yield from held.documents


def _text(source: TextSource, field: str, found: Found) -> Iterator[Document]:
    for file in found.files:
        if source.per_line:
            for number, line in _lines(file, field):
                yield Document(f"{file.name}:{number}", source.domain, line)
        else:
            yield Document(file.name, source.domain, "\n".join(line for _, line in _lines(file, field)))


def _lines(file: SourceFile, field: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file; only line feeds end a line, not every separator that Unicode has."""
    try:
        with file.open("rt", encoding="utf-8-sig", compression="infer") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.removesuffix("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}.path: {file.path!r} cannot be read ({error}); it takes text in UTF-8") from error


def _json_rows(field: str, found: Found) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in found.files:
        for number, line in _lines(file, field):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{field}.path: line {number} of {file.path!r} is no JSON object; it takes one per line"
                )
            yield f"{file.name}:{number}", row


def _arrow_rows(source: ParquetSource, field: str, found: Found) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in found.files:
        try:
            with file.open("rb") as stream:
                number = 0
                for batch in _batches(stream, source, field):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file.name}:{number}", row
        except (OSError, pa.ArrowException) as error:
            problem = f"{file.path!r} cannot be read ({error})"
            raise ConfigError(f"{field}.path: {problem}; it takes a Parquet, Arrow or Feather file") from error


def _batches(stream: Any, source: ParquetSource, field: str) -> Iterator[Any]:
    """The wanted columns batch by batch, as a file may be larger than memory; its first bytes tell its format."""
    magic = stream.read(6)
    stream.seek(0)
    if magic.startswith(b"PAR1"):
        table = pq.ParquetFile(stream)
        _check_columns(source, field, table.schema_arrow.names)
        yield from table.iter_batches(columns=list(_wanted(source)))
        return
    reader = pa.ipc.open_file(stream) if magic == b"ARROW1" else pa.ipc.open_stream(stream)
    _check_columns(source, field, reader.schema.names)
    batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if magic == b"ARROW1" else reader
    for batch in batches:
        yield batch.select(list(_wanted(source)))


def _datasets(source: DatasetsSource, field: str, folder: Path) -> Iterator[Document]:
    import datasets  # noqa: PLC0415  seconds to import, for one kind of source

    local = folder.absolute() / source.name
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            str(local) if local.exists() else source.name,
            source.config,
            split=source.split,
            revision=source.revision,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        asked = f"{source.name!r} (config {source.config!r}, split {source.split!r}) cannot be loaded"
        right = "name a data set with that config and split, on the hub or in a folder"
        raise ConfigError(f"{field}.name: {asked}: {error}; {right}") from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    _check_columns(source, field, rows.column_names)
    prefix = "/".join(part for part in (source.name, source.config, source.split) if part)
    numbered = ((f"{prefix}:{n}", row) for n, row in enumerate(rows.select_columns(list(_wanted(source))), start=1))
    yield from _row_documents(source, field, numbered)


def _row_documents(source: RowSource, field: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Document]:
    for name, row in rows:
        _check_columns(source, field, row, name)
        text = row[source.text_field]
        if not isinstance(text, str | None):
            raise ConfigError(
                f"{field}.text_field: {source.text_field!r} holds no text in {name}; it takes a field of texts"
            )
        domain = source.domain if source.domain_field is None else row[source.domain_field]
        if not isinstance(domain, str | int):
            raise ConfigError(
                f"{field}.domain_field: {source.domain_field!r} names no domain in {name}; it takes a field of names"
            )
        yield Document(name, str(domain), text or "")  # null is a text of no characters, which the filter counts


def _wanted(source: RowSource) -> Iterator[str]:
    yield source.text_field
    if source.domain_field is not None and source.domain_field != source.text_field:
        yield source.domain_field


def _check_columns(source: RowSource, field: str, known: Iterable[str], where: str = "the data") -> None:
    names = list(known)
    for key in ("text_field", "domain_field"):
        name = getattr(source, key)
        if name is not None and name not in names:
            raise ConfigError(f"{field}.{key}: {name!r} is not in {where}; it takes one of {', '.join(names)}")
