from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from audit.storage import (
    NoAnswerError,
    Storage,
    StorageError,
    failure,
    is_transient,
    open_filesystem,
    retried,
    storage_errors,
)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "place") if request.param == "local" else f"memory://{tmp_path}")


def test_files_are_written_whole_and_read_back(storage: Storage) -> None:
    assert storage.read("a/b.json") is None
    storage.write("a/b.json", b"1")
    storage.write("a/b.json", b"22")
    storage.write("a/c/d", b"3")
    assert storage.read("a/b.json") == b"22"
    assert storage.read_many(["a/c/d", "a/b.json"]) == [b"3", b"22"]
    assert storage.list("a") == ["a/b.json", "a/c"]
    assert storage.list() == ["a"]
    assert storage.list("nothing") == []
    storage.delete(["a/c", "never"])
    assert storage.list("a") == ["a/b.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_many(["a/c/d"])


def test_a_file_is_created_once(storage: Storage) -> None:
    assert storage.create("lease/1", b"ours")
    assert not storage.create("lease/1", b"theirs")
    assert storage.read("lease/1") == b"ours"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"has no room left \(No space left on device\); make room there"):
            storage.write("a", b"new")
    assert storage.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "x"), StorageError, "has no room left"),
        (OSError(errno.EDQUOT, "x"), StorageError, "has no room left"),
        (OSError(errno.EROFS, "x"), StorageError, "is read-only"),
        (PermissionError("Access Denied"), StorageError, "refuses access (Access Denied)"),
        (FileNotFoundError("no bucket"), StorageError, "is not there (no bucket)"),
        (OSError(errno.EBUSY, "Slow Down"), NoAnswerError, "does not answer (Slow Down)"),
        (TimeoutError("x"), NoAnswerError, "does not answer"),
        (ConnectionResetError("x"), NoAnswerError, "does not answer"),
        (OSError(errno.EIO, "broken"), StorageError, "cannot be used (OSError: broken)"),
    ],
)
def test_what_storage_refuses_is_a_sentence(error: Exception, kind: type[StorageError], words: str) -> None:
    found = failure(error, "s3://b/run1")
    assert type(found) is kind
    assert str(found).startswith(f"s3://b/run1 {words}")
    assert is_transient(error) == (kind is NoAnswerError)


def test_a_mistake_of_the_program_is_none_of_storage() -> None:
    assert failure(ValueError("x"), "s3://b/run1") is None
    with pytest.raises(ValueError, match=r"^x$"), storage_errors("s3://b/run1"):
        raise ValueError("x")
    with pytest.raises(ZeroDivisionError):
        retried(lambda: 1 / 0, "s3://b/run1", print)


def test_what_is_transient_is_tried_again_and_said() -> None:
    said: list[str] = []
    errors: list[Exception] = [TimeoutError("late"), ConnectionError("cut")]

    def operation() -> int:
        if errors:
            raise errors.pop(0)
        return 7

    assert retried(operation, "s3://b/run1", said.append, pauses=(0.0, 0.25, 0.5)) == 7
    assert said == [
        "s3://b/run1 does not answer (late); it is tried again in 0 s",
        "s3://b/run1 does not answer (cut); it is tried again in 0.25 s",
    ]
    errors += [TimeoutError("late"), TimeoutError("late")]
    with pytest.raises(NoAnswerError, match="late"):
        retried(operation, "s3://b/run1", said.append, pauses=(0.0,))
    errors += [PermissionError("no")]
    with pytest.raises(StorageError, match="refuses access"):
        retried(operation, "s3://b/run1", said.append)
    assert len(said) == 3  # a refusal is not tried again


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match=r"foo://x: Protocol not known: foo; name a local folder or a URL"):
        open_filesystem("foo://x")
