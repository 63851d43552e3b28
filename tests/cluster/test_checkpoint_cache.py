"""Checkpoints behind a URL, fetched by processes of this machine from a real S3 server."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import BUCKET, S3Server, s3_server

from audit.storage import StorageError
from cluster.groups.checkpoint_cache import Checkpoint, fetch, find, local_folder

HERE = Path(__file__).parent
URL = f"s3://{BUCKET}/model"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": np.random.default_rng(1).bytes(3_000_000),
    "model-00002-of-00002.safetensors": np.random.default_rng(2).bytes(2_000_000),
    "pytorch_model.bin": b"a pickle",
    "original/weights.pth": b"another",
}
NEEDED = [name for name in FILES if name.endswith(("json", "safetensors"))]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the checkpoint as it should be."""
    filesystem = fsspec.filesystem("s3")
    for name, content in FILES.items():
        filesystem.pipe_file(f"{BUCKET}/model/{name}", content)
    server.requests.clear()
    monkeypatch.setenv("MOE_AUDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def process(checkpoint: Checkpoint) -> subprocess.Popen[str]:
    search = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    return subprocess.Popen(
        [sys.executable, str(HERE / "fetch_checkpoint.py"), json.dumps(checkpoint.record())],
        env={**os.environ, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetches(server: S3Server, name: str = NEEDED[1]) -> int:
    return sum(request == f"GET /{BUCKET}/model/{name}" for request in server.requests)


def require_whole(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "fetched.json"} == {
        name: FILES[name] for name in NEEDED
    }


def test_the_driver_learns_the_hashes_once(server: S3Server, cache: Path) -> None:
    found = find(URL)
    assert [(file.name, file.bytes, file.sha256) for file in found.files] == [
        (name, len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest()) for name in NEEDED
    ]
    require_whole(fetch(found))
    assert find(URL) == found
    assert fetches(server) == 1
    assert [file.name for file in find(URL, allow_pickle=True).files] == [*NEEDED, "pytorch_model.bin"]
    # Changed files are other files.
    fsspec.filesystem("s3").pipe_file(f"{BUCKET}/model/{NEEDED[2]}", FILES[NEEDED[2]][::-1])
    assert [new.sha256 == old.sha256 for new, old in zip(find(URL).files, found.files, strict=True)] == [1, 1, 0]


def test_of_many_processes_at_once_one_fetches(server: S3Server, cache: Path) -> None:
    checkpoint = find(URL)
    shutil.rmtree(cache)
    server.requests.clear()
    processes = [process(checkpoint) for _ in range(3)]
    folders = {process.communicate(timeout=240)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    assert folders == {str(cache / checkpoint.digest)}
    require_whole(cache / checkpoint.digest)
    assert fetches(server) == 1


def test_nothing_of_a_killed_fetch_is_used(server: S3Server, cache: Path) -> None:
    checkpoint = find(URL)
    shutil.rmtree(cache)
    with server.holding(f"GET /{BUCKET}/model/{NEEDED[2]}") as held:
        killed = process(checkpoint)
        assert held.reached.wait(60)
        deadline = time.monotonic() + 60
        first = cache / f"{checkpoint.digest}.part" / NEEDED[1]
        while not (first.exists() and first.stat().st_size == len(FILES[NEEDED[1]])) and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
    assert first.read_bytes() == FILES[NEEDED[1]]  # it was in the middle
    assert not (cache / checkpoint.digest).exists()
    first.write_bytes(b"half a file")
    require_whole(fetch(checkpoint))
    assert not first.exists()


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "gone"])
def test_a_damaged_copy_is_fetched_again(server: S3Server, cache: Path, damage: str) -> None:
    checkpoint = find(URL)
    file = fetch(checkpoint) / NEEDED[1]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(FILES[NEEDED[1]][: 99 if damage == "shorter" else None][::-1])
    require_whole(fetch(checkpoint))
    assert fetches(server) == 2


def test_files_that_changed_since_the_driver_saw_them_are_refused(cache: Path) -> None:
    checkpoint = find(URL)
    shutil.rmtree(cache)
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{BUCKET}/model/{NEEDED[1]}", FILES[NEEDED[1]][::-1])
    with pytest.raises(StorageError, match=rf"{NEEDED[1]} of {URL} has SHA-256 .* begun with .*; put the file"):
        fetch(checkpoint)
    filesystem.pipe_file(f"{BUCKET}/model/{NEEDED[1]}", b"shorter")
    with pytest.raises(StorageError, match=r"has 7 bytes, expected were 3,000,000"):
        fetch(checkpoint)
    filesystem.rm_file(f"{BUCKET}/model/{NEEDED[1]}")
    with pytest.raises(StorageError, match=rf"holds no {NEEDED[1]} any more"):
        fetch(checkpoint)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_what_cannot_be_fetched_is_one_sentence(server: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"^model.source: s3://bucket/other holds no config.json; name the URL"):
        find(f"s3://{BUCKET}/other")
    with server.refusing("GET", "AccessDenied"), pytest.raises(StorageError, match=r"refuses access .*credentials"):
        find(URL)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"^model.source: gs://b/x: the driver of gs:// is not installed"):
        find("gs://b/x")
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
        with pytest.raises(StorageError, match=r"takes 0.00 GiB, .* has 0.00 GiB of room; make room there"):
            find(URL)
    cache.parent.joinpath("file").touch()
    monkeypatch.setenv("MOE_AUDIT_CACHE", str(cache.parent / "file" / "below"))
    with pytest.raises(StorageError, match=r"^model.source: fetching s3://bucket/model: .*MOE_AUDIT_CACHE"):
        find(URL)


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tmpfs would be refused before: others fill this disk while the files come."""
    checkpoint = find(URL)
    shutil.rmtree(cache)
    filesystem = fsspec.core.url_to_fs(URL, use_listings_cache=False)[0]

    def full(remote: str, local: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "get_file", full)
        with pytest.raises(StorageError, match=rf"{cache} has no room left for {URL}; make room"):
            fetch(checkpoint)
    require_whole(fetch(checkpoint))


def test_what_is_no_url_is_left_to_the_library() -> None:
    assert local_folder("demo") is None
    assert local_folder("owner/name") is None
