"""Journals: JSON-lines files that grow during a run.

A local file is appended to. Object stores cannot append: there ``progress.jsonl`` is the lines of all objects in
``progress/``. A process puts its latest object again with every line, up to 256 KiB, and then begins another.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from audit.storage import Storage, storage_errors

_SEGMENT_BYTES = 256 << 10


class Journal:
    """One JSON-lines file of a run folder."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._folder = PurePosixPath(name).stem
        self._segment = ""  # the object this process is writing
        self._held = b""  # its content

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. Raises StorageError."""
        line = (json.dumps(record, default=str) + "\n").encode()
        if self._storage.is_local:
            with storage_errors(self._storage.url):
                self._append_local(line)
            return
        if not self._segment or len(self._held) + len(line) > _SEGMENT_BYTES:
            last = self._storage.list(self._folder)[-1:]
            number = int(PurePosixPath(last[0]).stem.partition("-")[0]) + 1 if last else 0
            self._segment, self._held = f"{self._folder}/{number:06d}-{uuid.uuid4().hex[:8]}.jsonl", b""
        self._held += line
        self._storage.write(self._segment, self._held)

    def lines(self) -> list[dict[str, Any]]:
        """The records; a line cut off by a crash is left out."""
        if self._storage.is_local:
            parts = [self._storage.read(self._name) or b""]
        else:
            parts = self._storage.read_many(self._storage.list(self._folder))
        records: list[dict[str, Any]] = []
        for line in b"".join(parts).decode("utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def _append_local(self, line: bytes) -> None:
        with open(self._storage.path(self._name), "ab+") as handle:
            if handle.seek(0, 2):
                handle.seek(-1, 2)
                if handle.read() != b"\n":
                    handle.write(b"\n")  # a crash or a full disk cut the line before off
            handle.write(line)
