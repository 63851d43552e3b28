"""Checkpoints behind a URL: fetched once on each machine, then mapped by every process from there.

The driver lists the files and fetches them, and so knows their SHA-256. A rank is told these and takes the copy on its
machine, or makes one: under a file lock, into a folder beside it, checked, and renamed into place. What a killed
process left is not used. Copies are named by their content, so two URLs of the same files share one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from audit.storage import StorageError, failure, is_url, open_filesystem, retried

_STAMP = "fetched.json"  # in a copy: what was fetched, and when each file was written
_FETCHES = 8  # at once
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHERS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")  # weights for other libraries
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created")


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a checkpoint behind a URL, as the driver found them."""

    url: str
    files: tuple[CheckpointFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents; the name of its copy."""
        return hashlib.sha256(json.dumps([(file.name, file.sha256) for file in self.files]).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        return {"url": self.url, "files": [asdict(file) for file in self.files]}


def cache_folder() -> Path:
    """``MOE_AUDIT_CACHE``, or ``~/.cache/moe-audit/checkpoints``."""
    return Path(os.environ.get("MOE_AUDIT_CACHE") or "~/.cache/moe-audit/checkpoints").expanduser()


def find(url: str, *, allow_pickle: bool = False, say: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """List a checkpoint and learn the hashes of its files, from its copy where they have not changed since.

    Raises StorageError, one sentence: not there, refused, or no room for it.
    """
    with _errors_of_source(url):
        listed = _list(url, allow_pickle)
        cache = _made(cache_folder())
        key = hashlib.sha256(json.dumps([url, listed], default=str).encode()).hexdigest()
        known = cache / f"{key}.list"
        with _lock(cache / f"{key}.lock"):
            if known.exists():
                record = json.loads(known.read_text())
                return Checkpoint(record["url"], tuple(CheckpointFile(**file) for file in record["files"]))
            with _part(cache, key) as part:
                files = _download(url, [(name, size) for name, size, _ in listed], part, say)
                checkpoint = Checkpoint(url, files)
                with _lock(cache / f"{checkpoint.digest}.lock"):
                    if not _is_intact(cache / checkpoint.digest, checkpoint):
                        _put_in_place(part, cache / checkpoint.digest, checkpoint)
            _write(known, json.dumps(checkpoint.record()))
            return checkpoint


def fetch(checkpoint: Checkpoint, *, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of this machine's copy, made where there is none. Of several processes one fetches, the others wait.

    Raises StorageError, one sentence: refused, no room for it, or not the files that the driver found.
    """
    with _errors_of_source(checkpoint.url):
        cache = _made(cache_folder())
        target = cache / checkpoint.digest
        with _lock(cache / f"{checkpoint.digest}.lock"):
            if not _is_intact(target, checkpoint):
                with _part(cache, checkpoint.digest) as part:
                    sizes = [(file.name, file.bytes) for file in checkpoint.files]
                    found = _download(checkpoint.url, sizes, part, say)
                    for expected, file in zip(checkpoint.files, found, strict=True):
                        if file != expected:
                            raise StorageError(
                                f"model.source: {file.name} of {checkpoint.url} has SHA-256 {file.sha256[:12]}..., the "
                                f"run was begun with {expected.sha256[:12]}...; put the file back, or begin a new run"
                            )
                    _put_in_place(part, target, checkpoint)
        return target


def local_folder(source: str, *, allow_pickle: bool = False) -> str | None:
    """Where the files of ``model.source`` lie on this machine if it is a URL, fetched if need be; None if it is none.

    Raises StorageError.
    """
    return str(fetch(find(source, allow_pickle=allow_pickle))) if is_url(source) else None


def _list(url: str, allow_pickle: bool) -> list[tuple[str, int, str]]:
    """Name, bytes and version of every file that loading may read, by name."""
    filesystem, root = open_filesystem(url)
    try:
        listed = retried(partial(filesystem.ls, root, detail=True), url, lambda text: None)
    except FileNotFoundError:
        listed = []
    left_out = _OTHERS if allow_pickle else (*_OTHERS, *_PICKLES)
    files = []
    for entry in listed:
        name = posixpath.basename(entry["name"].rstrip("/"))
        if entry["type"] == "file" and not name.endswith(left_out):
            version = next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")
            files.append((name, int(entry["size"]), version))
    if "config.json" not in {name for name, _, _ in files}:
        raise StorageError(
            f"model.source: {url} holds no config.json; name the URL of a checkpoint's folder, or check the name"
        )
    return sorted(files)


def _download(
    url: str, files: Sequence[tuple[str, int]], into: Path, say: Callable[[str], None]
) -> tuple[CheckpointFile, ...]:
    size, free = sum(size for _, size in files), shutil.disk_usage(into).free
    if size > free:
        raise StorageError(
            f"model.source: {url} takes {size / 2**30:.2f} GiB, {into.parent} has {free / 2**30:.2f} GiB of room; make "
            "room there, or name another folder in MOE_AUDIT_CACHE"
        )
    filesystem, root = open_filesystem(url)

    def one(name: str, expected: int) -> CheckpointFile:
        target = into / name
        try:
            retried(partial(filesystem.get_file, f"{root}/{name}", str(target)), url, say)
        except FileNotFoundError:
            raise StorageError(
                f"model.source: {url} holds no {name} any more; put it back, or begin a new run"
            ) from None
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"model.source: {into.parent} has no room left for {url}; make room there, or name another folder "
                    "in MOE_AUDIT_CACHE"
                ) from error
            raise
        with open(target, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        if target.stat().st_size != expected:
            raise StorageError(
                f"model.source: {name} of {url} has {target.stat().st_size:,} bytes, expected were {expected:,}; "
                "it changed meanwhile: put it back, or begin a new run"
            )
        return CheckpointFile(name, expected, found)

    with ThreadPoolExecutor(_FETCHES) as threads:
        return tuple(threads.map(lambda file: one(*file), files))


def _is_intact(copy: Path, checkpoint: Checkpoint) -> bool:
    """Whether the copy is there and nobody wrote to its files after they were checked."""
    try:
        written = json.loads((copy / _STAMP).read_text())
        return all(_stamp(copy / file.name) == written[file.name] for file in checkpoint.files)
    except (OSError, ValueError, KeyError):
        return False


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _put_in_place(part: Path, target: Path, checkpoint: Checkpoint) -> None:
    _write(part / _STAMP, json.dumps({file.name: _stamp(part / file.name) for file in checkpoint.files}))
    if target.exists():  # damaged; who has mapped it keeps what was mapped
        shutil.rmtree(target)
    part.rename(target)
    _sync_folder(target.parent)


@contextmanager
def _part(cache: Path, name: str) -> Iterator[Path]:
    """A new folder to fetch into, gone afterwards; the caller holds the lock of the name, so what is there is left over
    from a process that was killed.
    """
    folder = cache / f"{name}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The kernel lets go when the process ends, however it ends."""
    with open(path, "ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _errors_of_source(url: str) -> Iterator[None]:
    """Within the block every error says that it is about ``model.source``."""
    try:
        yield
    except StorageError as error:
        if str(error).startswith("model.source"):
            raise
        raise StorageError(f"model.source: {error}") from error
    except OSError as error:
        refused = failure(error, str(cache_folder()))
        raise StorageError(f"model.source: fetching {url}: {refused}, or name another in MOE_AUDIT_CACHE") from error


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    part.rename(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
