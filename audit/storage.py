"""Storage by URL: a local folder, ``s3://``, ``gs://`` or whatever else fsspec opens; its failures in one sentence.

Transient failures (a store that is overloaded or does not answer) are tried again with growing pauses.
"""

from __future__ import annotations

import errno
import os
import posixpath
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import fsspec
import fsspec.core
import fsspec.implementations.local
import pyarrow.fs

T = TypeVar("T")

_READS = 32  # at once
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a transient failure is tried again
DRIVERS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol: the extra of this package that brings it
# A folder is nothing of its own there; "making" one may make a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "obs", "r2", "memory"}
# What the clients of object stores raise without turning it into an OSError.
_CLIENTS = {"aiobotocore", "aiohttp", "azure", "boto3", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"}
_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.ETIMEDOUT),  # S3's InternalError, as s3fs says it
}
_TRANSIENT_NAMES = {
    "ClientConnectionError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ServerDisconnectedError",
}


class StorageError(Exception):
    """Storage refused; the message is one sentence: where, why, and what to do."""


class NoAnswerError(StorageError):
    """Storage was overloaded or did not answer: trying again may help."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. No listing is cached: others write to the same place.

    Raises StorageError where the protocol is unknown or its driver is not installed.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = DRIVERS.get(protocol)
        what = f"pip install 'moe-audit[{extra}]'" if extra else f"install it ({_first_line(error)})"
        raise StorageError(f"{url}: the driver of {protocol}:// is not installed; {what}") from error
    except ValueError as error:
        raise StorageError(
            f"{url}: {_first_line(error)}; name a local folder or a URL such as s3://bucket/run1"
        ) from error
    return filesystem, str(path).rstrip("/") or "/"


def is_url(place: str) -> bool:
    """Whether a place is written as a URL, ``protocol://...``."""
    return "://" in place


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the store was overloaded, did not answer, or the connection broke."""
    for cause in _causes(error):
        if (
            isinstance(cause, TimeoutError | ConnectionError | NoAnswerError)
            or type(cause).__name__ in _TRANSIENT_NAMES
        ):
            return True
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT:
            return True
        status = _http_status(cause)
        if status is not None and (status == 429 or status >= 500):
            return True
    return False


def failure(error: BaseException, place: str) -> StorageError | None:
    """What storage refused, as one sentence about ``place``; None where the error is none of storage."""
    for cause in _causes(error):
        if isinstance(cause, StorageError):  # Ray Data adds lines to a message on its way
            return type(cause)(str(cause).partition("\n")[0])
        if isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] in _CLIENTS:
            kind = NoAnswerError if is_transient(cause) else StorageError
            return kind(f"{place} {_sentence(cause)}")
    return None


def retried(operation: Callable[[], T], place: str, say: Callable[[str], None], pauses: Sequence[float] = PAUSES) -> T:
    """The operation's result. Transient failures are tried again after ``pauses`` (seconds), and said.

    Raises StorageError for what storage refuses. An absent file is no refusal: FileNotFoundError stays what it is.
    """
    for pause in (*pauses, None):
        try:
            return operation()
        except FileNotFoundError:
            raise
        except Exception as error:
            refused = failure(error, place)
            if refused is None:
                raise
            if pause is None or not is_transient(error):
                raise refused from error
            say(f"{refused}; it is tried again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Within the block what storage refuses is a StorageError."""
    try:
        yield
    except Exception as error:
        refused = failure(error, place)
        if refused is None or refused is error:
            raise
        raise refused from error


class Storage:
    """The files below one URL, by names relative to it. Making one touches nothing.

    Transient failures are tried again after ``pauses``, and ``say`` is told.
    """

    def __init__(self, url: str, *, pauses: Sequence[float] = PAUSES) -> None:
        self._fs, self.root = open_filesystem(url)
        self.url = self.root if self.is_local else url.rstrip("/")
        self.say: Callable[[str], None] = lambda text: None
        self._pauses = pauses

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)

    @property
    def has_folders(self) -> bool:
        """Whether a folder must be there before a file can be in it; object stores have none."""
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        return not protocols & _OBJECT_STORES

    def path(self, *parts: str) -> str:
        """A path below the root, as its file system writes it."""
        return posixpath.join(self.root, *parts)

    def arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        if self.is_local:
            return pyarrow.fs.LocalFileSystem()
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs))

    def exists(self, *name: str) -> bool:
        return bool(self._do(lambda: self._fs.exists(self.path(*name))))

    def is_file(self) -> bool:
        """Whether the root itself is a file."""
        return bool(self._do(lambda: self._fs.isfile(self.root)))

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            return bytes(self._do(lambda: self._fs.cat_file(self.path(name))))
        except FileNotFoundError:
            return None

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The contents of files, many at once. Raises FileNotFoundError."""
        with ThreadPoolExecutor(_READS) as threads:
            return list(threads.map(lambda name: bytes(self._do(partial(self._fs.cat_file, self.path(name)))), names))

    def list(self, folder: str = "") -> list[str]:
        """The names directly inside a folder, sorted; none where the folder is not there."""
        path = self.path(folder) if folder else self.root

        def listed() -> list[str]:
            self._fs.invalidate_cache(path)
            return [str(found) for found in self._fs.ls(path, detail=False)]

        try:
            found = self._do(listed)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {posixpath.basename(name.rstrip("/")) for name in found if name.rstrip("/") != path.rstrip("/")}
        return sorted(f"{folder}/{name}" if folder else name for name in names)

    def make_folder(self, folder: str = "") -> None:
        """Make a folder where the store has such a thing."""
        if self.has_folders:
            self._writing(lambda: self._fs.makedirs(self.path(folder) if folder else self.root, exist_ok=True))

    def write(self, name: str, data: bytes) -> None:
        """All or nothing, and durable: an object store puts in one step; elsewhere a file is renamed into place."""
        target = self.path(name)
        self.make_folder(posixpath.dirname(name))
        if self.is_local:
            self._writing(lambda: _write_local(target, data))
        elif self.has_folders:
            self._writing(lambda: self._rename_into_place(target, data))
        else:
            self._writing(lambda: self._fs.pipe_file(target, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file only if there is none; whether it was written. One of many at once wins where the store can
        put conditionally (S3, Google, local); elsewhere the last one does.
        """
        self.make_folder(posixpath.dirname(name))
        try:
            self._writing(lambda: self._fs.pipe_file(self.path(name), data, mode="create"))
        except (StorageError, ValueError, NotImplementedError, TypeError) as error:
            if self.has_folders and isinstance(error, StorageError) and not _was_there(error):
                self.delete([name])  # begun and not finished
                raise
            if self.read(name) is None:
                self.write(name, data)  # a store that cannot put conditionally; one that is broken says so now
        return self.read(name) == data

    def delete(self, names: Sequence[str]) -> None:
        """Delete files and folders with all below them; what is not there any more is deleted."""
        for path in map(self.path, names):
            with suppress(FileNotFoundError):
                self._do(partial(self._fs.rm, path, recursive=True))

    def sync(self, names: Sequence[str]) -> None:
        """Return when these files will outlive a loss of power; object stores answer no sooner than that."""
        if self.is_local:
            for name in (*names, *{posixpath.dirname(name) for name in names}):
                self._writing(partial(_sync, self.path(name)))

    def _rename_into_place(self, target: str, data: bytes) -> None:
        part = f"{target}.{uuid.uuid4().hex[:8]}.part"
        self._fs.pipe_file(part, data)
        if self._fs.exists(target):  # many of these file systems do not rename onto another file
            self._fs.rm_file(target)
        self._fs.mv(part, target)

    def _do(self, operation: Callable[[], T]) -> T:
        return retried(operation, self.url, self.say, self._pauses)

    def _writing(self, operation: Callable[[], T]) -> T:
        try:
            return self._do(operation)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url} {_sentence(error)}") from error


def _write_local(target: str, data: bytes) -> None:
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, target)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
    _sync(os.path.dirname(target))


def _was_there(error: StorageError) -> bool:
    return any(isinstance(cause, FileExistsError) for cause in _causes(error))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it. One that came through Ray holds it in ``cause``, and is of its class besides."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        inner = getattr(cause, "cause", None)
        if isinstance(inner, BaseException):
            waiting.append(inner)
        else:
            yield cause
        waiting.append(cause.__cause__)


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _sentence(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    said = _first_line(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"has no room left ({said}); make room there"
    if number == errno.EROFS:
        return f"is read-only ({said}); name a place that can be written"
    if isinstance(error, PermissionError):
        return f"refuses access ({said}); check the permissions, or the credentials of this machine and of the workers"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return f"refuses access ({said}); set the store's credentials, such as AWS_ACCESS_KEY_ID, on every machine"
    if isinstance(error, FileNotFoundError):
        return f"is not there ({said}); check the name, and make a bucket before it is used"
    if is_transient(error):
        return f"does not answer ({said})"
    return f"cannot be used ({type(error).__name__}: {said})"


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = str(text).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
