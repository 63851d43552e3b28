"""A file system of its own protocol, ``faulty:///path``, on a local folder: writing fails where a file says so.

The file, named by FAULTY_STORAGE, is read by every process: {"pattern": of paths, "errno": number, "after": bytes that
still go into the file, "skip": files that still can be written}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

VARIABLE = "FAULTY_STORAGE"


class FaultyFile:
    """Takes so many bytes."""

    def __init__(self, file: Any, after: int, number: int) -> None:
        self._file, self._left, self._errno = file, after, number

    def write(self, data: bytes) -> int:
        self._file.write(bytes(data)[: self._left])
        if len(data) > self._left:
            self._file.flush()
            raise OSError(self._errno, os.strerror(self._errno))
        self._left -= len(data)
        return len(data)

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class FaultyFileSystem(fsspec.AbstractFileSystem):
    protocol = "faulty"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("faulty://").rstrip("/") or "/"

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._local.ls(self._strip_protocol(path), detail=detail)

    def info(self, path: str, **options: Any) -> Any:
        return self._local.info(self._strip_protocol(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._local.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        self._local.rm_file(self._strip_protocol(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._local.rm(self._strip_protocol(path), recursive=recursive)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        os.rename(self._strip_protocol(path1), self._strip_protocol(path2))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        path = self._strip_protocol(path)
        file = open(path, mode)  # noqa: SIM115 -- closed by the caller
        control = Path(os.environ[VARIABLE])
        if "r" in mode or not control.exists():
            return file
        fault = json.loads(control.read_text())
        if not re.search(fault["pattern"], path) or _count(control) <= fault["skip"]:
            return file
        return FaultyFile(file, fault["after"], fault["errno"])


def _count(control: Path) -> int:
    """How many files were opened that the fault is about, by all processes."""
    counter = os.open(f"{control}.count", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(counter, b".")
    size = os.fstat(counter).st_size
    os.close(counter)
    return size


@contextmanager
def fault(pattern: str, number: int, *, after: int = 0, skip: int = 0) -> Iterator[None]:
    """Within the block writing fails, in every process."""
    control = Path(os.environ[VARIABLE])
    control.write_text(json.dumps({"pattern": pattern, "errno": number, "after": after, "skip": skip}))
    try:
        yield
    finally:
        control.unlink()
        Path(f"{control}.count").unlink(missing_ok=True)


def register() -> None:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
