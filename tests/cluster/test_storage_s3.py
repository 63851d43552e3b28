"""Runs whose folder is on a real S3 server."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import psutil
import pytest
import yaml
from s3_server import BUCKET, S3Server, s3_server
from stub_job import make_job, rows_of
from stub_worker import tables

from audit.demo import CHECKPOINT
from audit.models import ModelError
from audit.runfolder import Manifest, RunFolder, RunFolderError, lease
from audit.runfolder.lease import Lease, Owner
from audit.storage import Storage, StorageError
from cluster.display import LineDisplay
from cluster.run import execute, reduce_again
from cluster.session import ray_session
from jobs.cli import main

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def ray(no_ray: None, server: S3Server) -> Iterator[None]:
    """Begun with the server's address in the environment, so that every process has it."""
    with ray_session(cpus=2):
        yield


def url(name: str) -> str:
    return f"s3://{BUCKET}/{name}"


def run(place: str, **options: int) -> tuple[RunFolder, str]:
    out = io.StringIO()
    folder = RunFolder(place)
    assert execute(make_job(calibration=2, **options), folder, LineDisplay(out)).exit_status == 0
    return folder, out.getvalue()


def objects(place: str) -> set[str]:
    """Everything below a URL, as the server has it."""
    return {f"s3://{path}" for path in fsspec.filesystem("s3", use_listings_cache=False).find(place)}


def results_of(place: str) -> dict[str, bytes]:
    filesystem, root = fsspec.core.url_to_fs(f"{place}/results", use_listings_cache=False)
    names = [path for path in filesystem.find(root) if path.endswith(".parquet")]
    return {path.rpartition("/")[2]: filesystem.cat_file(path) for path in names}


def require_exact(folder: RunFolder) -> None:
    """Every row once, none missing, and no file that no manifest names."""
    for name in ("effects", "tokens"):
        expected = rows_of([tables(task)[name] for task in make_job().stages[-1][1]])
        assert rows_of([folder.dataset(name).to_table()]) == expected
        assert {path.removeprefix("s3://") for path in objects(f"{folder.url}/{name}")} == set(folder.files(name))


@pytest.fixture(scope="module")
def local(ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the same run in a local folder."""
    folder, _ = run(str(tmp_path_factory.mktemp("local")))
    return results_of(folder.url)


def test_a_run_on_s3_gives_the_bytes_of_a_local_one(local: dict[str, bytes]) -> None:
    folder, _ = run(url("whole"), groups=1)
    require_exact(folder)
    assert set(local) == {"layers.parquet", "experts.parquet", "noise_floor.parquet"}
    assert results_of(folder.url) == local
    assert folder.lines("progress.jsonl")[-1]["stage"] == "effects"
    before = objects(folder.url)
    assert reduce_again(folder, LineDisplay(io.StringIO())) == sorted(local)
    assert results_of(folder.url) == local
    # Nothing is there besides what docs/storage.md names; the lease is that of the last driver, let go.
    kinds = {name.removeprefix(f"{folder.url}/").split("/")[0] for name in before}
    assert kinds == {"effects", "tokens", "observations", "manifests", "results", "progress", "run.json", "lease"}
    assert [name.removeprefix(f"{folder.url}/") for name in objects(f"{folder.url}/lease")] == ["lease/000002.json"]


@pytest.mark.full  # make test has it on a local folder
def test_a_run_goes_on_where_a_killed_driver_left_it(local: dict[str, bytes]) -> None:
    """Killed when the second commit's files are written and its manifest is not."""
    place = url("killed")
    search = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    killed = subprocess.run(
        [sys.executable, str(HERE / "killed_driver.py"), place, "manifest", "4"],
        env={**os.environ, "PYTHONPATH": search},
        timeout=300,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = RunFolder(place).done()
    assert 3 <= len(before) < 12
    orphans = objects(f"{place}/effects") - {f"s3://{path}" for path in RunFolder(place).files("effects")}
    assert orphans
    folder, said = run(place, groups=1)
    assert "ended without letting go; its run is taken over" in said
    assert "deleted 1 commits" in said
    assert not orphans & objects(f"{place}/effects")
    require_exact(folder)
    assert results_of(place) == local
    assert before.items() <= folder.done().items()


def test_a_second_driver_is_refused_while_the_first_lives(server: S3Server) -> None:
    first, second = RunFolder(url("twice")), RunFolder(url("twice"))
    with first.lock():
        with pytest.raises(RunFolderError, match=rf"is in use by process {os.getpid()} on .*wait for it or end it$"):
            execute(make_job(), second, LineDisplay(io.StringIO()))
        first.commit(Manifest("c-1", "run", {}))
    with second.lock():
        pass
    assert not second.holds_run()


def elsewhere(**changes: object) -> Owner:
    """An owner on another machine, whose process nobody here can see."""
    return replace(Owner.here(), **{"machine": "another", "host": "node-7", "process": 77} | changes)  # type: ignore[arg-type]


def test_a_driver_on_another_machine_is_watched(server: S3Server) -> None:
    """Refused while its lease changes, taken over when it does not, and it finds that out."""
    said: list[str] = []
    storage = Storage(url("watched"))
    storage.say = said.append
    theirs = Lease(storage, refresh_seconds=0.2)
    theirs._owner = elsewhere()
    theirs.take()
    ours = Lease(storage, refresh_seconds=0.2, stale_seconds=3.0)
    with pytest.raises(RunFolderError, match=r"is in use by process 77 on node-7 since"):
        ours.take()
    assert "process 77 on node-7 may still hold s3://bucket/watched" in said[0]
    theirs._ended.set()  # it hangs, and does not renew its lease
    theirs._thread.join()  # type: ignore[union-attr]
    ours.take()
    assert "process 77 on node-7 ended without letting go" in said[-1]
    ours.require_held()
    theirs.refresh_seconds = 0.0
    with pytest.raises(StorageError, match=r"was taken over by another driver"):
        theirs.require_held()
    theirs.release()  # and does not take it back
    ours._renew()
    ours.require_held()
    ours.release()
    assert storage.list(lease.FOLDER) == ["lease/000002.json"]


def test_an_owner_that_cannot_live_any_more_is_not_waited_for(server: S3Server) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(dead.pid).create_time()
    dead.wait()
    for name, owner in {
        "dead": replace(Owner.here(), process=dead.pid, started=started),
        "its number went to another": replace(Owner.here(), started=Owner.here().started - 100),
        "old": elsewhere(time=time.time() - 1000),
        "let go": elsewhere(released=True),
    }.items():
        storage = Storage(url(f"owners/{name}"))
        storage.write("lease/000041.json", owner.encoded())
        ours = Lease(storage)
        ours.take()
        assert storage.list(lease.FOLDER) == ["lease/000042.json"]
        ours.release()


def test_of_drivers_that_begin_at_once_one_gets_the_folder(server: S3Server) -> None:
    storage, theirs = Storage(url("race")), elsewhere()
    assert storage.create("lease/000001.json", theirs.encoded())
    assert not storage.create("lease/000001.json", Owner.here().encoded())
    assert storage.read("lease/000001.json") == theirs.encoded()


def test_commits_are_not_made_after_the_folder_was_taken_over(server: S3Server) -> None:
    folder = RunFolder(url("lost"))
    with folder.lock():
        folder.commit(Manifest("c-1", "run", {"t1": {}}))
        assert folder._lease is not None
        Storage(folder.url).write("lease/000002.json", elsewhere().encoded())
        folder._lease.refresh_seconds = 0.0  # as if this process had been asleep
        with pytest.raises(StorageError, match="leave the run to that one"):
            folder.commit(Manifest("c-2", "run", {"t2": {}}))
    assert list(RunFolder(folder.url).done()) == ["t1"]


def test_manifests_are_read_once_and_lists_are_fresh(server: S3Server) -> None:
    writer, reader = RunFolder(url("manifests")), RunFolder(url("manifests"))
    for number in range(20):
        writer.commit(Manifest(f"c-{number:02d}", "run", {f"t{number}": {}}))
    server.requests.clear()
    assert len(reader.done()) == 20
    assert sum(request.startswith("GET") and ".json" in request for request in server.requests) == 20
    server.requests.clear()
    assert len(reader.done()) == 20
    assert [request for request in server.requests if ".json" in request] == []
    writer.commit(Manifest("c-20", "run", {"t20": {}}))
    assert len(reader.done()) == 21
    assert not reader.holds_run()
    writer.begin({"identity": {}})
    assert reader.holds_run()
    assert reader.read_result("a.json") is None
    writer.write_result("a.json", "{}")
    assert reader.list_files("results") == ["results/a.json"]
    writer.write_result("a.json", "[]")
    assert reader.read_result("a.json") == "[]"


def test_journals_grow_by_bounded_objects(server: S3Server) -> None:
    folder = RunFolder(url("journal"))
    for number in range(60):
        folder.append("progress.jsonl", {"number": number, "padding": "x" * 10_000})
    RunFolder(folder.url).append("progress.jsonl", {"number": 60})
    sizes = [len(Storage(folder.url).read(name) or b"") for name in folder.list_files("progress")]
    assert len(sizes) == 4  # 600 kB in pieces of at most 256 KiB, and that of another process
    assert max(sizes) <= 256 << 10
    assert [line["number"] for line in folder.lines("progress.jsonl")] == list(range(61))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/run1", r"s3://no-such-bucket/run1 is not there \(.*make a bucket before it is used"),
        ("foo://bucket/run1", r"foo://bucket/run1: Protocol not known: foo; name a local folder or a URL such as s3"),
        (url("file"), r"--out: s3://bucket/file is a file"),
        (url("other"), r"--out: s3://bucket/other holds files but no run.json"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_any_work(server: S3Server, place: str, message: str) -> None:
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{BUCKET}/file", b"")
    filesystem.pipe_file(f"{BUCKET}/other/thesis.tex", b"")
    before = objects(url(""))
    with pytest.raises((RunFolderError, StorageError), match=message):
        execute(make_job(), RunFolder(place), LineDisplay(io.StringIO()))
    assert objects(url("")) == before


@pytest.mark.parametrize("refused", ["GET", "PUT"])
def test_denied_access_is_one_sentence_before_any_work(server: S3Server, refused: str) -> None:
    with (
        server.refusing(f"{refused} ", "AccessDenied"),
        pytest.raises(StorageError, match=r"s3://bucket/denied refuses access \(.*the credentials of this machine"),
    ):
        execute(make_job(), RunFolder(url("denied")), LineDisplay(io.StringIO()))


def test_a_missing_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"the driver of gs:// is not installed; pip install 'moe-audit\[gcs\]'"):
        RunFolder("gs://bucket/run1")


# The command line, with a real model whose checkpoint is on S3 too ----------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def specification(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    filesystem = fsspec.filesystem("s3")
    for path in CHECKPOINT.iterdir():
        filesystem.pipe_file(f"{BUCKET}/model/{path.name}", path.read_bytes())
    file = tmp_path_factory.mktemp("audit") / "audit.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"source": url("model")},
                "corpus": {"sources": [{"kind": "demo", "domains": ["prose"], "documents_per_domain": 4}]},
                "calibration": {"documents": 2},
                "layers": [1],
                "positions": {"sample": 20},
                "cluster": {"max_groups": 1},
            }
        )
    )
    return file


def test_the_commands_take_urls(
    specification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("run", specification, "--out", url("audit"), "--display", "none") == 0
    results = results_of(url("audit"))
    record = RunFolder(url("audit")).require_run()
    assert record["model"]["source"] == url("model")
    assert {file["name"]: file["bytes"] for file in record["checkpoint"]["files"]} == {
        path.name: path.stat().st_size for path in CHECKPOINT.iterdir()
    }
    capsys.readouterr()
    assert command("status", url("audit")) == 0
    assert url("audit") in capsys.readouterr().out
    assert command("reduce", url("audit")) == 0
    assert results_of(url("audit")) == results
    keep = ("--metric", "reap", "--keep", "6", "--out")
    assert command("prune", url("audit"), *keep, tmp_path / "pruned") == 0
    assert (tmp_path / "pruned" / "config.json").is_file()
    capsys.readouterr()
    assert command("status", url("nothing")) == 2
    assert "holds no run.json; name a folder that `moe-audit run` has written" in capsys.readouterr().err


@pytest.mark.full
def test_an_audit_on_s3_gives_the_bytes_of_a_local_one(specification: Path, tmp_path: Path) -> None:
    for place in (str(tmp_path / "run"), url("twin")):
        assert command("run", specification, "--out", place, "--display", "none") == 0
    assert results_of(url("twin")) == results_of(str(tmp_path / "run"))


def test_other_weights_on_a_machine_end_the_run(
    specification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank whose copy was exchanged along with its stamps: only the digest of what was loaded tells."""
    monkeypatch.setattr("cluster.planning.plan.weights_digest", lambda *parts: "0" * 64)
    assert command("run", specification, "--out", tmp_path / "run", "--display", "none") == 1
    said = capsys.readouterr().err
    assert "a group could not be made ready" in said
    assert f"the weights of {url('model')} on" in said
    assert "those of the run 000000000000..." in said
    assert not RunFolder(str(tmp_path / "run")).done()
    assert ModelError.__name__ in said
