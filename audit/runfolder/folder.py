"""The run folder: what is in it, and what may be done with it.

==================  ==========================================================================================
``run.json``        the resolved specification, versions, model and corpus hashes, seeds, the plan's size
``manifests/``      one JSON file per commit, written last: the only truth about what is done
``effects/``        the effect table (``audit.effects.EFFECTS``), one folder of Parquet files per commit
``tokens/``         the token table (``audit.effects.TOKENS``), likewise
``pruning/``        the pruning table (``audit.pruning.PRUNING``), where the redundancy study is made
``observations/``   calibration: sums, means and reservoirs, per part and merged
``results/``        tables reduced from all of that
``quarantine.jsonl``  tasks given up, with the error's text; ``progress.jsonl``: one line every few seconds
==================  ==========================================================================================

What no manifest names is a commit that never happened: a reader does not see it, the next run deletes it.
The place may be a local path or any fsspec URL (``s3://...``); docs/storage.md says what differs there.
"""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from audit.effects import EFFECTS, TOKENS
from audit.pruning.schema import PRUNING
from audit.runfolder import lease, manifests
from audit.runfolder.errors import RunFolderError
from audit.runfolder.journal import Journal
from audit.runfolder.lease import Lease
from audit.runfolder.manifests import Manifest, Manifests
from audit.storage import Storage, StorageError

TableName = Literal["effects", "tokens", "pruning"]
SCHEMAS: Mapping[TableName, pa.Schema] = {"effects": EFFECTS, "tokens": TOKENS, "pruning": PRUNING}
COMMITTED = (*SCHEMAS, "observations")


class RunFolder:
    """Reads and writes one run folder. Making one touches nothing.

    Every method that does may raise ``audit.storage.StorageError``, one sentence, where storage refuses.
    """

    def __init__(self, url: str) -> None:
        self._storage = Storage(url)
        self._manifests = Manifests(self._storage)
        self._journals: dict[str, Journal] = {}
        self._lease: Lease | None = None
        self.url = self._storage.url

    @property
    def is_local(self) -> bool:
        return self._storage.is_local

    def path(self, *parts: str) -> str:
        """A path inside the folder, as this folder's file system writes it."""
        return self._storage.path(*parts)

    def arrow_filesystem(self) -> pa.fs.FileSystem:
        return self._storage.arrow_filesystem()

    def tell(self, say: Callable[[str], None]) -> None:
        """Have ``say`` told what storage makes of it from now on: failures that are tried again, a lease watched."""
        self._storage.say = say

    # Begin and resume ------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        return self._storage.exists("run.json")

    def require_usable(self) -> None:
        """Raise RunFolderError where the place is taken by something that is not a run."""
        if self.holds_run():
            return
        if self._storage.is_file():
            raise RunFolderError(f"--out: {self.url} is a file; name a new folder, or one that holds a run")
        # A run that was killed before its first file may have left these.
        left = ("lock", lease.FOLDER)
        if any(name not in left and not name.endswith(".part") for name in self._storage.list()):
            raise RunFolderError(
                f"--out: {self.url} holds files but no run.json; name a new or empty folder, or one that holds a run"
            )

    def require_run(self) -> dict[str, Any]:
        """The content of run.json; raises RunFolderError where there is none."""
        content = self._storage.read("run.json")
        if content is None:
            raise RunFolderError(f"{self.url}: holds no run.json; name a folder that `moe-audit run` has written")
        return dict(json.loads(content))

    def begin(self, run: Mapping[str, Any]) -> None:
        text = json.dumps(run, indent=2, sort_keys=True, default=str) + "\n"
        self._storage.write("run.json", text.encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one driver: a lock that the kernel lets go of when the process ends, however it ends; on
        object stores a lease. Raises RunFolderError while another driver holds it.
        """
        if self.is_local:
            with self._local_lock():
                yield
            return
        self._storage.make_folder()
        held = Lease(self._storage)
        held.take()
        self._lease = held
        try:
            yield
        finally:
            self._lease = None
            try:
                held.release()
            except StorageError as error:  # it is taken over when this process has ended
                self._storage.say(str(error))

    def delete_orphans(self) -> int:
        """Delete what no manifest names; returns how many commits that never happened were found."""
        paths = [path for manifest in self._manifests.all() for listed in manifest.files.values() for path in listed]
        named = {"/".join(path.split("/")[:2]) for path in paths}
        orphans = [name for kind in COMMITTED for name in self._storage.list(kind) if name not in named]
        orphans += [name for name in self._storage.list(manifests.FOLDER) if not name.endswith(".json")]
        parts = [name for folder in ("", "results") for name in self._storage.list(folder) if name.endswith(".part")]
        self._storage.delete([*orphans, *parts])
        return len({posixpath.basename(name) for name in orphans})

    # Commits ---------------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from here on its tasks are done. Its files are made to outlive a loss of power first."""
        tables = [path for table in SCHEMAS for path in manifest.files.get(table, ())]
        self._storage.sync(tables)
        if self._lease is not None:
            self._lease.require_held()
        self._manifests.write(manifest)

    def manifests(self) -> list[Manifest]:
        """Every commit, in the order of their names; raises RunFolderError where two name the same task."""
        return self._manifests.all()

    def done(self) -> dict[str, Mapping[str, Any]]:
        """The receipts of every task that is done, by task id."""
        return {task: receipt for manifest in self.manifests() for task, receipt in manifest.tasks.items()}

    def files(self, name: str) -> list[str]:
        """Paths of the committed files of a table, in a fixed order."""
        return sorted(self.path(path) for manifest in self.manifests() for path in manifest.files.get(name, ()))

    def list_files(self, folder: str) -> list[str]:
        """The files directly inside one folder, committed or not, relative to the run folder."""
        return self._storage.list(folder)

    def make_folder(self, folder: str) -> None:
        """Make a folder where storage has such a thing."""
        self._storage.make_folder(folder)

    def delete(self, names: Sequence[str]) -> None:
        """Delete files and folders, relative to the run folder."""
        self._storage.delete(names)

    def dataset(self, name: TableName) -> pa.dataset.Dataset:
        """The committed rows of a table: ``.to_table()``, ``.to_table(filter=...)``, ``.head(5)``."""
        filesystem = self.arrow_filesystem()
        return pa.dataset.dataset(self.files(name), SCHEMAS[name], format="parquet", filesystem=filesystem)

    # Small files -----------------------------------------------------------------------------------------------------

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to a JSON-lines file."""
        self._journal(name).append(record)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; a line cut off by a crash is left out."""
        return self._journal(name).lines()

    def write_table(self, name: str, table: pa.Table | Iterator[pa.Table]) -> None:
        """Write ``results/<name>.parquet``, replacing it in one step; memory holds what it is compressed to.

        ``table``: one, or its parts in order, at least one, of which one is held at a time.
        """
        parts = iter([table]) if isinstance(table, pa.Table) else table
        first = next(parts)
        sink = pa.BufferOutputStream()
        with pa.parquet.ParquetWriter(sink, first.schema, compression="zstd") as writer:
            for part in chain([first], parts):
                writer.write_table(part)
        self._storage.write(f"results/{name}.parquet", sink.getvalue().to_pybytes())

    def write_result(self, name: str, text: str) -> None:
        """Write ``results/<name>``, replacing it in one step."""
        self._storage.write(f"results/{name}", text.encode())

    def read_result(self, name: str) -> str | None:
        """``results/<name>``; None where the run has not got there."""
        content = self._storage.read(f"results/{name}")
        return None if content is None else content.decode("utf-8")

    def read_table(self, name: str) -> pa.Table:
        """``results/<name>.parquet``; raises FileNotFoundError where the run has not got there."""
        content = self._storage.read(f"results/{name}.parquet")
        if content is None:
            path = self.path("results", f"{name}.parquet")
            raise FileNotFoundError(f"{path} is not there yet; run the same command again to finish the run")
        return pa.parquet.read_table(pa.BufferReader(content))

    def _journal(self, name: str) -> Journal:
        return self._journals.setdefault(name, Journal(self._storage, name))

    @contextmanager
    def _local_lock(self) -> Iterator[None]:
        try:
            self._storage.make_folder()
            handle = open(self.path("lock"), "ab+", buffering=0)  # noqa: SIM115 -- closed below
        except (OSError, StorageError) as error:
            raise self._unwritable(error) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read().decode().strip()
                raise RunFolderError(f"--out: {self.url} is in use by process {owner}; wait for it or end it") from None
            try:
                handle.truncate(0)
                handle.write(str(os.getpid()).encode())
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def _unwritable(self, error: OSError | StorageError) -> RunFolderError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return RunFolderError(f"--out: {self.url} cannot be written ({reason}); name a folder that can")
