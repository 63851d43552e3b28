"""The committer: tables of many tasks become a few Parquet files, then a manifest; only then are the tasks done."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow.parquet as pq
import ray.exceptions

from audit.runfolder import Manifest, RunFolder
from audit.storage import NoAnswerError, StorageError, failure, retried
from cluster.driver.commits import ResultsLostError
from cluster.driver.driver import RunError
from cluster.driver.group import Handle, Result
from cluster.results.parquet_sink import Written, is_lost, write_tables
from cluster.worker import TABLES

_FOOTERS = 16  # read at once

WriteTables = Callable[[Sequence[Handle], RunFolder, str], Sequence[Written]]
"""Write the tables behind the handles as Parquet files into a folder (relative to the run folder)."""


@dataclass(frozen=True, slots=True)
class FolderCommitter:
    """Commits into a run folder. ``say`` is told what is tried again."""

    folder: RunFolder
    run: str
    say: Callable[[str], None] = lambda text: None
    write_tables: WriteTables = write_tables
    is_lost: Callable[[Handle], bool] = is_lost

    def commit(self, results: Sequence[Result]) -> None:
        """Raises ResultsLostError (run those tasks again), StorageError (storage refuses), or RunError (rows do not add
        up). After each of them nothing was committed, but for a manifest that storage wrote and did not confirm.
        """
        files: dict[str, list[str]] = {}
        commit = f"c-{uuid.uuid4().hex[:12]}"
        for table in TABLES:
            holders = [result for result in results if result.receipt["rows"].get(table)]
            if holders:
                files[table] = retried(lambda: self._write(table, commit, holders), self.folder.url, self.say)  # noqa: B023 -- called at once
        folders = [str(result.receipt["folder"]) for result in results if result.receipt.get("folder")]
        if folders:
            files["observations"] = folders
        self.folder.commit(Manifest(commit, self.run, {result.task: result.receipt for result in results}, files))

    def _write(self, table: str, commit: str, holders: Sequence[Result]) -> list[str]:
        target = f"{table}/{commit}"
        try:
            written = self.write_tables([result.tables[table] for result in holders], self.folder, target)
            self._verify(target, written, sum(int(result.receipt["rows"][table]) for result in holders))
            named = sorted(file.name for file in written)
            self.folder.delete([name for name in self.folder.list_files(target) if name not in named])
            return named
        except Exception as error:
            with suppress(StorageError):  # the next run deletes what is left
                self.folder.delete([target])
            if isinstance(error, RunError):
                raise
            if refused := failure(error, self.folder.url):
                raise refused from error
            if isinstance(error, ray.exceptions.RayError):
                lost = [result.task for result in holders if self.is_lost(result.tables[table])]
                if lost:
                    raise ResultsLostError(lost) from error
                place, reason = self.folder.path(target), " ".join(str(error).split())[-300:]
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise RunError(f"{place} could not be written: {reason}") from error
                raise NoAnswerError(f"{place} could not be written, its writer is gone: {reason}") from error
            raise

    def _verify(self, target: str, written: Sequence[Written], expected: int) -> None:
        filesystem = self.folder.arrow_filesystem()

        def rows(file: Written) -> int:
            return int(pq.read_metadata(self.folder.path(file.name), filesystem=filesystem).num_rows)

        try:
            with ThreadPoolExecutor(_FOOTERS) as threads:
                found = sum(threads.map(rows, written))
        except FileNotFoundError as error:
            raise RunError(
                f"{self.folder.path(target)} was written by another machine and is not seen here; name a folder that "
                "all machines share, or a URL such as s3://bucket/run1"
            ) from error
        if found != expected:
            place = self.folder.path(target)
            raise RunError(f"{place} holds {found} rows, the receipts say {expected}; nothing was committed")
