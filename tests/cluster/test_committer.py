"""Commits without Ray: tables are handles themselves, and writers fail as Ray says that they do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import WorkerCrashedError

from audit.runfolder import RunFolder
from audit.storage import StorageError
from benchmarks.faults.trial import LAYERS, tables
from cluster.driver.commits import ResultsLostError
from cluster.driver.driver import RunError
from cluster.driver.group import Result
from cluster.results.committer import FolderCommitter
from cluster.results.parquet_sink import Written, encoded
from cluster.tasks import Task


@pytest.fixture
def results() -> list[Result]:
    """Of two tasks of five positions."""
    made = [Task(id=f"effects-{i:04d}", kind="measure", positions=(np.arange(1, 6),), layers=LAYERS) for i in range(2)]
    return [
        Result(
            task=task.id,
            tables=(found := tables(task)),
            receipt={"rows": {name: table.num_rows for name, table in found.items()}},
        )
        for task in made
    ]


class Writer:
    """Writes one file; its process dies ``deaths`` times when the file is there and nobody was told of it."""

    def __init__(self, deaths: int = 0) -> None:
        self.deaths, self.calls = deaths, 0

    def __call__(self, refs: Sequence[pa.Table], folder: RunFolder, target: str) -> list[Written]:
        self.calls += 1
        table, name = pa.concat_tables(refs), f"{target}/{self.calls}.parquet"
        path = Path(folder.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(table))
        if self.deaths > 0:
            self.deaths -= 1
            raise WorkerCrashedError
        return [Written(name, table.num_rows)]


def test_a_writer_that_dies_is_replaced_and_leaves_no_file(tmp_path: Path, results: list[Result]) -> None:
    folder, said = RunFolder(str(tmp_path)), list[str]()
    FolderCommitter(folder, "run", said.append, Writer(deaths=1), lambda ref: False).commit(results)
    assert list(folder.done()) == [result.task for result in results]
    assert "its writer is gone" in said[0]
    assert "it is tried again in 1 s" in said[0]
    for name in ("effects", "tokens"):
        expected = sum(result.tables[name].num_rows for result in results)
        assert folder.dataset(name).count_rows() == expected
        assert {str(path) for path in (tmp_path / name).rglob("*.parquet")} == set(folder.files(name))


def test_a_writer_that_always_dies_ends_the_run_with_nothing_committed(
    tmp_path: Path, results: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.storage.time.sleep", lambda seconds: None)
    folder = RunFolder(str(tmp_path))
    with pytest.raises(StorageError, match="could not be written, its writer is gone"):
        FolderCommitter(folder, "run", write_tables=Writer(deaths=99), is_lost=lambda ref: False).commit(results)
    assert not folder.done()
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_table_that_is_lost_names_its_task(tmp_path: Path, results: list[Result]) -> None:
    def is_lost(ref: object) -> bool:
        return any(ref is table for table in results[1].tables.values())

    with pytest.raises(ResultsLostError) as raised:
        FolderCommitter(RunFolder(str(tmp_path)), "run", write_tables=Writer(99), is_lost=is_lost).commit(results)
    assert raised.value.tasks == [results[1].task]


def test_rows_that_do_not_add_up_are_not_committed(tmp_path: Path, results: list[Result]) -> None:
    results[0].receipt["rows"]["effects"] += 1
    folder = RunFolder(str(tmp_path))
    with pytest.raises(RunError, match=r"holds \d+ rows, the receipts say \d+; nothing was committed"):
        FolderCommitter(folder, "run", write_tables=Writer()).commit(results)
    assert not folder.done()
