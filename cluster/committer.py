"""The committer: tables of many tasks become a few Parquet files, then a manifest; only then are the tasks done."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from audit.runfolder import SCHEMAS, Manifest, RunFolder
from cluster.driver import ResultsLostError, RunError
from cluster.replica import Handle, Result

TABLES = tuple(SCHEMAS)

WriteTables = Callable[[Sequence[Handle], RunFolder, str], None]
"""Write the tables behind the handles as Parquet files into a folder (relative to the run folder)."""


class UnwrittenError(Exception):
    """Tables could not be written. ``lost``: the handles whose tables are gone; empty where storage is at fault."""

    def __init__(self, reason: str, lost: Sequence[Handle]) -> None:
        super().__init__(reason)
        self.lost = lost


@dataclass(frozen=True, slots=True)
class FolderCommitter:
    """Commits into a run folder."""

    folder: RunFolder
    run: str
    write_tables: WriteTables

    def commit(self, results: Sequence[Result]) -> None:
        """Raises ResultsLostError (run those tasks again) or RunError (storage refuses, or rows do not add up)."""
        commit = f"c-{uuid.uuid4().hex[:12]}"
        files: dict[str, list[str]] = {}
        for table in TABLES:
            holders = [result for result in results if result.receipt["rows"].get(table)]
            if holders:
                files[table] = self._write(table, commit, holders)
        folders = [str(result.receipt["folder"]) for result in results if result.receipt.get("folder")]
        if folders:
            files["observations"] = folders
        self.folder.commit(Manifest(commit, self.run, {result.task: result.receipt for result in results}, files))

    def _write(self, table: str, commit: str, holders: Sequence[Result]) -> list[str]:
        target = f"{table}/{commit}"
        try:
            self.write_tables([result.tables[table] for result in holders], self.folder, target)
        except UnwrittenError as error:
            if error.lost:
                lost = [result.task for result in holders if result.tables[table] in error.lost]
                raise ResultsLostError(lost) from error
            raise RunError(f"{self.folder.path(target)} could not be written: {error}") from error
        paths = self.folder.list_files(target)
        filesystem = self.folder.arrow_filesystem()
        written = sum(pq.read_metadata(self.folder.path(path), filesystem=filesystem).num_rows for path in paths)
        expected = sum(int(result.receipt["rows"][table]) for result in holders)
        if written != expected:
            place = self.folder.path(target)
            raise RunError(f"{place} holds {written} rows, the receipts say {expected}; nothing was committed")
        return paths
