"""Reading documents: every kind of source, the filters, and one sentence where something is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from audit.config import AuditConfig, ConfigError
from audit.corpus import read_documents
from audit.demo.text import HeldOut
from audit.documents import Document

ROWS = [{"body": "first text", "topic": "a", "n": 1}, {"body": "second", "topic": "b", "n": 2}]


def read(folder: Path, *sources: dict[str, Any]) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    config = AuditConfig.parse({"corpus": {"sources": list(sources)}}, folder)
    documents, counts = read_documents(config.corpus, folder)
    return [(d.name, d.domain, d.text) for d in documents], {key: n for key, n in counts.items() if n}


def text(path: str, **more: Any) -> dict[str, Any]:
    return {"kind": "text", "path": path, "domain": "d", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "texts/b.txt": "bb\n",
        "texts/a.txt": "a\u2028 one\n\n two",
        "texts/deep/c.py": "x = 1\n",
        "texts/.hidden": "no",
        "rows/x.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
        "rows/readme.md": "no",
        "rows/x.jsonl.bak": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_folder_gives_a_document_per_file_in_the_order_of_paths(folder: Path) -> None:
    documents, counts = read(folder, text("texts"))
    assert documents == [
        ("texts/a.txt", "d", "a\u2028 one\n\n two"),
        ("texts/b.txt", "d", "bb"),
        ("texts/deep/c.py", "d", "x = 1"),
    ]
    assert counts == {"read": 3, "hidden_files": 1}


def test_files_patterns_urls_and_lines(folder: Path) -> None:
    assert read(folder, text("texts/b.txt"))[0] == [("b.txt", "d", "bb")]
    assert [name for name, _, _ in read(folder, text("texts/*.txt"))[0]] == ["a.txt", "b.txt"]
    assert [name for name, _, _ in read(folder, text("texts/**/*.py"))[0]] == ["deep/c.py"]
    assert read(folder, text(f"file://{folder}/texts/b.txt"))[0] == [("b.txt", "d", "bb")]
    documents, counts = read(folder, text("texts/a.txt", per_line=True))
    assert documents == [("a.txt:1", "d", "a\u2028 one"), ("a.txt:3", "d", " two")]
    assert counts == {"read": 3, "too_short": 1}


def test_a_byte_order_mark_and_gzip_are_understood(folder: Path) -> None:
    (folder / "marked.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfcaf\xc3\xa9\r\nline"))
    assert read(folder, text("marked.txt.gz"))[0] == [("marked.txt.gz", "d", "café\nline")]


def test_the_published_filter(folder: Path) -> None:
    lines = ["", " = Heading = ", "x" * 50, " " * 9 + "y" * 51 + " ", "z" * 60, "w" * 70, "v" * 80]
    (folder / "wiki.txt").write_text("\n".join(lines))
    documents, counts = read(folder, text("wiki.txt", per_line=True, min_characters=50, first=2))
    # Reference: [line for line in lines if len(line.strip()) > 50][:2], the texts themselves unchanged.
    assert [text for _, _, text in documents] == [" " * 9 + "y" * 51 + " ", "z" * 60]
    assert counts == {"read": 5, "too_short": 3}


def test_repeated_texts_are_counted(folder: Path) -> None:
    (folder / "same.txt").write_text("once\ntwice\nonce\nonce")
    assert read(folder, text("same.txt", per_line=True))[1] == {"read": 4, "duplicates": 2}


def test_json_lines(folder: Path) -> None:
    source = {"kind": "jsonl", "path": "rows", "text_field": "body", "domain_field": "topic"}
    documents, counts = read(folder, source)
    assert documents == [("rows/x.jsonl:1", "a", "first text"), ("rows/x.jsonl:2", "b", "second")]
    assert counts == {"read": 2, "other_files": 2}


@pytest.mark.parametrize("form", ["parquet", "feather", "stream"])
def test_columnar_files(tmp_path: Path, form: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    if form == "parquet":
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    elif form == "feather":
        pyarrow.feather.write_feather(table, tmp_path / "x.feather", chunksize=1)
    else:
        with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    (path,) = tmp_path.iterdir()
    documents, _ = read(tmp_path, {"kind": "parquet", "path": path.name, "text_field": "body", "domain_field": "n"})
    assert documents == [(f"{path.name}:1", "1", "first text"), (f"{path.name}:2", "2", "second")]


def test_a_data_set_by_name_is_loaded_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": [f"{split} one", None, f"{split} two"]}), tmp_path / f"mine/{split}.parquet")
    source = {"kind": "datasets", "name": "mine", "split": "test", "domain": "d"}
    documents, counts = read(tmp_path, source)
    assert documents == [("mine/test:1", "d", "test one"), ("mine/test:3", "d", "test two")]
    assert counts == {"read": 3, "too_short": 1}
    with pytest.raises(ConfigError, match=r"corpus\.sources\.0\.name: 'mine' .*split 'dev'.* cannot be loaded"):
        read(tmp_path, source | {"split": "dev"})
    with pytest.raises(ConfigError, match=r"text_field: 'body' is not in the data; it takes one of text"):
        read(tmp_path, source | {"text_field": "body"})


def test_the_demo_text_comes_from_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def held_out(*arguments: object) -> HeldOut:
        asked.append(arguments)
        documents = [Document("n", "math", "1 + 1 = 2")]
        return HeldOut(documents, dropped={"math": 3}, shortened={"math": 1}, digest="")

    monkeypatch.setattr("audit.corpus.sources.held_out", held_out)
    source = {"kind": "demo", "domains": ["math"], "documents_per_domain": 1, "seed": 5}
    documents, counts = read(Path(), source)
    assert asked == [(("math",), 1, 5)]
    assert documents == [("n", "math", "1 + 1 = 2")]
    assert counts == {"read": 1, "demo_overlapping": 3, "demo_shortened": 1}


def test_sources_follow_one_another(folder: Path) -> None:
    first = {"kind": "jsonl", "path": "rows/x.jsonl", "text_field": "body", "domain": "rows", "first": 1}
    documents, _ = read(folder, first, text("texts/b.txt"))
    assert [(name, domain) for name, domain, _ in documents] == [("x.jsonl:1", "rows"), ("b.txt", "d")]


ROW = {"kind": "jsonl", "path": "rows/x.jsonl", "text_field": "body", "domain": "d"}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (text("absent.txt"), ["corpus.sources.0.path", "'absent.txt'", "does not exist", "name a file"]),
        (text("texts/*.md"), ["corpus.sources.0.path", "'texts/*.md'", "matches no file"]),
        (text("empty"), ["corpus.sources.0.path", "'empty'", "holds no file"]),
        (text("nosuch://x"), ["corpus.sources.0.path", "'nosuch://x'", "cannot be reached"]),
        (text("latin.txt"), ["corpus.sources.0.path", "latin.txt", "text in UTF-8"]),
        (
            text("texts", min_characters=99),
            ["corpus.sources.0.min_characters", "99", "none of the 3 documents", "longest of"],
        ),
        (text("blank.txt"), ["corpus.sources.0", "its 1 documents hold no text"]),
        (ROW | {"path": "texts/b.txt"}, ["corpus.sources.0.path", "line 1", "b.txt", "JSON object"]),
        (ROW | {"path": "texts"}, ["corpus.sources.0.path", "'texts'", ".jsonl"]),
        (ROW | {"text_field": "text"}, ["corpus.sources.0.text_field", "'text'", "x.jsonl:1", "body, topic, n"]),
        (ROW | {"text_field": "n"}, ["corpus.sources.0.text_field", "'n'", "x.jsonl:1", "a field of texts"]),
        (
            {"kind": "parquet", "path": "rows/x.jsonl", "domain": "d"},
            ["corpus.sources.0.path", "x.jsonl", "a Parquet, Arrow or Feather file"],
        ),
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(folder: Path, source: dict[str, Any], told: list[str]) -> None:
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text(" \n ")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError) as raised:
        read(folder, source)
    said = str(raised.value)
    assert "\n" not in said
    assert said.startswith(told[0])
    assert [part for part in told if part not in said] == []


def test_a_wrong_path_is_told_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.sources\.1\.path: 'absent'"):
        read(folder, ROW | {"path": "texts/b.txt"}, text("absent"))
