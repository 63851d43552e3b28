"""Storage that fails in the middle: one sentence, what is committed stays, and the same command goes on later."""

from __future__ import annotations

import errno
import io
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import faulty_storage
import pyarrow as pa
import pytest
import ray
from faulty_storage import fault
from s3_server import BUCKET, S3Server, s3_server
from stub_job import make_job, rows_of
from stub_worker import tables

from audit.runfolder import RunFolder, RunFolderError
from audit.storage import Storage, StorageError
from cluster.display import LineDisplay
from cluster.driver.driver import RunError
from cluster.run import execute
from cluster.session import ray_session

NO_ROOM = r"has no room left \(No space left on device\); make room there"
RESULTS = ("layers", "experts", "noise_floor")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the client, so that its patience ends soon
        yield server


@pytest.fixture(scope="module")
def cluster(no_ray: None, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray, whose processes know the faulty file system."""
    faulty_storage.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faulty_storage.VARIABLE, str(tmp_path_factory.mktemp("faulty") / "fault.json"))
        hook = {"worker_process_setup_hook": faulty_storage.register}
        patch.setattr(ray, "init", partial(ray.init, runtime_env=hook))
        with ray_session(cpus=2):
            yield


def attempt(place: str) -> str:
    """The same command; returns what was said."""
    out = io.StringIO()
    assert execute(make_job(calibration=2, groups=1), RunFolder(place), LineDisplay(out)).exit_status == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    folder = tmp_path_factory.mktemp("whole")
    attempt(str(folder))
    return {name: RunFolder(str(folder)).read_table(name) for name in RESULTS}


def require_rows_of_what_is_done(folder: RunFolder) -> None:
    """What is committed can be read, and is the rows of the tasks that are done, each once."""
    done = folder.done()
    for name in ("effects", "tokens"):
        expected = [tables(task)[name] for task in make_job().stages[-1][1] if task.id in done]
        assert rows_of([folder.dataset(name).to_table()] if folder.files(name) else []) == rows_of(expected)


def require_whole(place: str, whole: dict[str, pa.Table]) -> None:
    folder = RunFolder(place)
    assert len(folder.done()) == 12
    require_rows_of_what_is_done(folder)
    assert {name: folder.read_table(name) for name in RESULTS} == whole
    left = {
        name
        for kind in ("effects", "tokens")
        for commit in folder.list_files(kind)
        for name in folder.list_files(commit)
    }
    assert {folder.path(name) for name in left} == {*folder.files("effects"), *folder.files("tokens")}
    assert not [name for kind in ("", "results", "manifests") for name in folder.list_files(kind) if "part" in name]


@pytest.mark.parametrize(
    ("pattern", "skip", "after", "done"),
    [
        ("/effects/", 0, 300, 3),  # in the first Parquet file
        pytest.param("/tokens/", 1, 0, 7, marks=pytest.mark.full),  # in the second commit, after the effects
        pytest.param("/manifests/", 3, 0, 7, marks=pytest.mark.full),  # between the files and the manifest
        pytest.param("/manifests/", 3, 80, 7, marks=pytest.mark.full),  # in the manifest
        ("/observations/", 1, 3, 0),  # in a worker
        pytest.param("/progress/", 2, 10, None, marks=pytest.mark.full),
        ("/results/experts", 0, 30, 12),
        pytest.param("/results/reduced", 0, 3, 12, marks=pytest.mark.full),
    ],
)
def test_a_disk_that_fills_up(
    whole: dict[str, pa.Table], tmp_path: Path, pattern: str, skip: int, after: int, done: int | None
) -> None:
    place = f"faulty://{tmp_path}/run"
    with (
        fault(pattern, errno.ENOSPC, after=after, skip=skip),
        pytest.raises(RunError, match=rf"^{re.escape(place)} {NO_ROOM}$"),
    ):
        attempt(place)
    folder = RunFolder(place)
    require_rows_of_what_is_done(folder)
    assert done is None or len(folder.done()) == done
    attempt(place)
    require_whole(place, whole)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, r"is read-only \(Read-only file system\); name a place that can be written"),
        pytest.param(
            errno.EACCES, r"refuses access \(Permission denied\); check the permissions", marks=pytest.mark.full
        ),
        pytest.param(errno.EIO, r"cannot be used \(OSError: Input/output error\)", marks=pytest.mark.full),
    ],
)
def test_a_disk_that_refuses_from_some_moment_on(
    whole: dict[str, pa.Table], tmp_path: Path, number: int, message: str
) -> None:
    place = f"faulty://{tmp_path}/run"
    with fault("/(effects|manifests|progress|tokens)/", number, skip=9), pytest.raises(RunError, match=message):
        attempt(place)
    require_rows_of_what_is_done(RunFolder(place))
    attempt(place)
    require_whole(place, whole)


@pytest.mark.parametrize("pattern", [pytest.param("/lease/", marks=pytest.mark.full), "/run.json"])
def test_a_full_disk_before_any_work(whole: dict[str, pa.Table], tmp_path: Path, pattern: str) -> None:
    place = f"faulty://{tmp_path}/run"
    with fault(pattern, errno.ENOSPC, after=5), pytest.raises(StorageError, match=NO_ROOM):
        attempt(place)
    attempt(place)
    require_whole(place, whole)


# A real full disk and a real read-only one ----------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.full  # make test has both by themselves: a disk that fills up, and a real disk without any room
@pytest.mark.parametrize("kilobytes", [60, 90])
def test_a_small_disk(whole: dict[str, pa.Table], tmp_path: Path, kilobytes: int) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, f"size={kilobytes}k"):
        with pytest.raises(RunError, match=NO_ROOM):
            attempt(str(disk / "run"))
        require_rows_of_what_is_done(RunFolder(str(disk / "run")))
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        attempt(str(disk / "run"))
        require_whole(str(disk / "run"), whole)


def test_a_disk_without_any_room_and_a_read_only_one(cluster: None, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=8k"):
        (disk / "filled").write_bytes(b"x" * 4096)
        with pytest.raises((RunFolderError, StorageError), match="No space left on device"):
            attempt(str(disk / "run"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises((RunFolderError, StorageError), match="Read-only file system"):
            attempt(str(disk / "other"))


# An object store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "PUT .*/observations/",
        pytest.param("PUT .*/manifests/", marks=pytest.mark.full),
        pytest.param("PUT .*/effects/", marks=pytest.mark.full),
        pytest.param("GET .*/effects/", marks=pytest.mark.full),
    ],
)
def test_access_that_is_withdrawn(whole: dict[str, pa.Table], server: S3Server, tmp_path: Path, pattern: str) -> None:
    place = f"s3://{BUCKET}/{tmp_path.name}"
    with (
        server.refusing(pattern, "AccessDenied", after=1) as refusal,
        pytest.raises(RunError, match=rf"^{place} refuses access \(.*check the permissions, or the credentials"),
    ):
        attempt(place)
    assert refusal.refused
    require_rows_of_what_is_done(RunFolder(place))
    attempt(place)
    require_whole(place, whole)


@pytest.mark.parametrize(
    "pattern",
    ["PUT .*/manifests/", *(pytest.param(f"PUT .*/{n}/", marks=pytest.mark.full) for n in ("tokens", "progress"))],
)
def test_a_store_that_is_overloaded_for_a_while(
    whole: dict[str, pa.Table], server: S3Server, tmp_path: Path, pattern: str
) -> None:
    place = f"s3://{BUCKET}/{tmp_path.name}"
    with server.refusing(pattern, "SlowDown", after=1, times=7) as refusal:
        said = attempt(place)
    assert refusal.refused == 7
    assert f"{place} does not answer (SlowDown" in said
    assert "it is tried again in 1 s" in said
    require_whole(place, whole)


@pytest.mark.full
def test_a_store_that_stays_overloaded(
    whole: dict[str, pa.Table], server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"s3://{BUCKET}/{tmp_path.name}"
    with (
        server.refusing("PUT .*/manifests/", "SlowDown", after=2),
        pytest.raises(RunError, match=rf"^{place} does not answer \(SlowDown"),
    ):
        attempt(place)
    require_rows_of_what_is_done(RunFolder(place))
    attempt(place)
    require_whole(place, whole)


def test_a_write_that_arrives_although_its_answer_does_not(server: S3Server) -> None:
    """The second try finds the file, and it is our own."""
    storage = Storage(f"s3://{BUCKET}/answers")
    assert storage.create("lease", b"ours")
    assert storage.create("lease", b"ours")
    assert not storage.create("lease", b"theirs")
