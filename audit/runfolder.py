"""The run folder: what a run leaves behind, and how it knows what is already done.

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
The place may be a local path or any fsspec URL (``s3://...``).
"""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from audit.effects import EFFECTS, TOKENS
from audit.pruning.schema import PRUNING

TableName = Literal["effects", "tokens", "pruning"]
SCHEMAS: Mapping[TableName, pa.Schema] = {"effects": EFFECTS, "tokens": TOKENS, "pruning": PRUNING}
COMMITTED = (*SCHEMAS, "observations")


class RunFolderError(ValueError):
    """The folder cannot be used for what was asked; the message names the field, what it holds and what was asked."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit: the tasks it completes and the files that hold their rows (paths relative to the run folder).

    ``tasks`` maps a task's id to its receipt: rows written per table and how it was run.
    """

    commit: str
    run: str  # digest of the run the commit belongs to
    tasks: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


class RunFolder:
    """Reads and writes one run folder. Making one touches nothing."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self.url = self._root if self.is_local else url.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """A path inside the folder, as this folder's file system writes it."""
        return posixpath.join(self._root, *parts)

    def arrow_filesystem(self) -> pa.fs.FileSystem:
        return pa.fs.LocalFileSystem() if self.is_local else pa.fs.PyFileSystem(pa.fs.FSSpecHandler(self._fs))

    # Begin and resume ------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        return bool(self._fs.exists(self.path("run.json")))

    def require_usable(self) -> None:
        """Raise RunFolderError where the place is taken by something that is not a run."""
        if not self._fs.exists(self._root) or self.holds_run():
            return
        if not self._fs.isdir(self._root):
            raise RunFolderError(f"--out: {self.url} is a file; name a new folder, or one that holds a run")
        if any(posixpath.basename(p) != "lock" for p in self._fs.ls(self._root, detail=False)):
            raise RunFolderError(
                f"--out: {self.url} holds files but no run.json; name a new or empty folder, or one that holds a run"
            )

    def require_run(self) -> dict[str, Any]:
        """The content of run.json; raises RunFolderError where there is none."""
        if not self.holds_run():
            raise RunFolderError(f"{self.url}: holds no run.json; name a folder that `moe-audit run` has written")
        return dict(json.loads(self._fs.cat_file(self.path("run.json"))))

    def begin(self, run: Mapping[str, Any]) -> None:
        self._write("run.json", json.dumps(run, indent=2, sort_keys=True, default=str) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one driver. The kernel lets go when the process ends, however it ends.

        Object stores have no such lock; there a second driver is found out when two manifests name the same task.
        """
        if not self.is_local:
            yield
            return
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            handle = open(self.path("lock"), "a+")  # noqa: SIM115 -- closed below
        except OSError as error:
            reason = error.strerror
            raise RunFolderError(f"--out: {self.url} cannot be written ({reason}); name a folder that can") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read().strip()
                raise RunFolderError(f"--out: {self.url} is in use by process {owner}; wait for it or end it") from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    def delete_orphans(self) -> int:
        """Delete what no manifest names; returns how many commits that never happened were found."""
        paths = [path for manifest in self.manifests() for listed in manifest.files.values() for path in listed]
        named = {"/".join(path.split("/")[:2]) for path in paths}
        orphans = [name for kind in COMMITTED for name in self._list(kind) if name not in named]
        orphans += [name for name in self._list("manifests") if not name.endswith(".json")]
        for orphan in orphans:
            self._fs.rm(self.path(orphan), recursive=True)
        return len({posixpath.basename(name) for name in orphans})

    # Commits ---------------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from here on its tasks are done."""
        self._write(f"manifests/{manifest.commit}.json", json.dumps(asdict(manifest), sort_keys=True) + "\n")

    def manifests(self) -> list[Manifest]:
        """Every commit, in the order of their names; raises RunFolderError where two name the same task."""
        names = [name for name in self._list("manifests") if name.endswith(".json")]
        manifests = [Manifest(**json.loads(self._fs.cat_file(self.path(name)))) for name in names]
        seen: dict[str, str] = {}
        for manifest in manifests:
            for task in manifest.tasks:
                if task in seen:
                    both = f"{seen[task]} and {manifest.commit}"
                    raise RunFolderError(f"{self.url}: {task} is in the commits {both}; two runs wrote here at once")
                seen[task] = manifest.commit
        return manifests

    def done(self) -> dict[str, Mapping[str, Any]]:
        """The receipts of every task that is done, by task id."""
        return {task: receipt for manifest in self.manifests() for task, receipt in manifest.tasks.items()}

    def files(self, name: str) -> list[str]:
        """Paths of the committed files of a table, in a fixed order."""
        return sorted(self.path(path) for manifest in self.manifests() for path in manifest.files.get(name, ()))

    def list_files(self, folder: str) -> list[str]:
        """The files directly inside one folder, committed or not, relative to the run folder."""
        return self._list(folder)

    def dataset(self, name: TableName) -> pa.dataset.Dataset:
        """The committed rows of a table: ``.to_table()``, ``.to_table(filter=...)``, ``.head(5)``."""
        filesystem = self.arrow_filesystem()
        return pa.dataset.dataset(self.files(name), SCHEMAS[name], format="parquet", filesystem=filesystem)

    # Small files -----------------------------------------------------------------------------------------------------

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to a JSON-lines file."""
        line = (json.dumps(record, default=str) + "\n").encode()
        if self.is_local:
            with open(self.path(name), "ab+") as handle:
                if handle.tell() and not self._fs.cat_file(self.path(name), start=-1).endswith(b"\n"):
                    handle.write(b"\n")  # a crash cut the line before off
                handle.write(line)
        else:  # object stores cannot append
            before = self._fs.cat_file(self.path(name)) if self._fs.exists(self.path(name)) else b""
            self._fs.pipe_file(self.path(name), before + line)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; a line cut off by a crash is left out."""
        if not self._fs.exists(self.path(name)):
            return []
        records: list[dict[str, Any]] = []
        for line in self._fs.cat_file(self.path(name)).decode("utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write ``results/<name>.parquet``, replacing it in one step."""
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression="zstd")
        self._write(f"results/{name}.parquet", sink.getvalue().to_pybytes())

    def write_result(self, name: str, text: str) -> None:
        """Write ``results/<name>``, replacing it in one step."""
        self._write(f"results/{name}", text)

    def read_result(self, name: str) -> str | None:
        """``results/<name>``; None where the run has not got there."""
        path = self.path("results", name)
        return str(self._fs.cat_file(path).decode("utf-8")) if self._fs.exists(path) else None

    def read_table(self, name: str) -> pa.Table:
        """``results/<name>.parquet``; raises FileNotFoundError where the run has not got there."""
        path = self.path("results", f"{name}.parquet")
        if not self._fs.exists(path):
            raise FileNotFoundError(f"{path} is not there yet; run the same command again to finish the run")
        return pa.parquet.read_table(pa.BufferReader(self._fs.cat_file(path)))

    def _list(self, folder: str) -> list[str]:
        self._fs.invalidate_cache(self.path(folder))
        if not self._fs.isdir(self.path(folder)):
            return []
        return sorted(
            f"{folder}/{posixpath.basename(p.rstrip('/'))}" for p in self._fs.ls(self.path(folder), detail=False)
        )

    def _write(self, name: str, content: str | bytes) -> None:
        """All or nothing: object stores put in one step; a local file is renamed into place."""
        data = content.encode() if isinstance(content, str) else content
        target = self.path(name)
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        if not self.is_local:
            self._fs.pipe_file(target, data)
            return
        part = f"{target}.{uuid.uuid4().hex[:8]}.part"
        with open(part, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, target)


def difference(old: Any, new: Any, field_name: str = "") -> tuple[str, Any, Any] | None:
    """The first field, by dotted name, in which two nested mappings differ: (field, old, new); None if they agree."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            found = difference(old.get(key), new.get(key), f"{field_name}.{key}" if field_name else str(key))
            if found:
                return found
        return None
    return None if old == new else (field_name, old, new)
