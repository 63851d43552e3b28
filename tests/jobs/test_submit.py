"""Audits as jobs on a real head: submitted, followed, stopped and gone on with, and every mistake in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import yaml
from ray._raylet import AuthenticationTokenLoader
from ray_head import Head, Proxy, ray_head
from s3_server import BUCKET, s3_server
from shapes import Call
from tiny_olmoe import write_tiny_olmoe

from audit.runfolder import RunFolder
from cluster.submission import job_client
from cluster.submission.job_client import JobClient, JobState

LONG = ["--set", "cluster.task_minutes=0.000001", "--set", "positions.sample=null"]  # a task per sequence


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, texts and ``audit.yaml``, and beside them what no cluster is to see."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny_olmoe(folder / "model", layers=2, experts=4, top_k=2)
    (folder / "texts").mkdir()
    for number in range(20):
        text = f"Document {number} says: the expert that answers is not the expert that was asked."
        (folder / "texts" / f"{number:02d}.txt").write_text(text)
    specification = {
        "name": "tiny",
        "model": {"source": "./model"},
        "corpus": {"sources": [{"kind": "text", "path": "texts", "domain": "prose"}], "max_tokens": 24},
        "calibration": {"documents": 4},
        "positions": {"sample": 60},
        "cluster": {"max_groups": 1},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return folder


@pytest.fixture(scope="module")
def head(no_ray: None) -> Iterator[Head]:
    with ray_head(cpus=2) as started:
        yield started


@pytest.fixture
def client(head: Head, monkeypatch: pytest.MonkeyPatch) -> JobClient:
    """With the token in the environment, for commands too."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return JobClient(head.address)


def wait_for(client: JobClient, job: str, text: str, seconds: float = 240.0) -> None:
    """Until the job has printed it."""
    deadline = time.monotonic() + seconds
    while text not in client.log(job):
        assert not client.state(job).over, client.log(job)
        assert time.monotonic() < deadline, client.log(job)
        time.sleep(0.05)


def test_a_job_does_the_audit_and_follow_ends_with_its_status(
    place: Path, head: Head, client: JobClient, call: Call
) -> None:
    """Into an object store that only the variables given with the job lead to."""
    with s3_server() as server:
        url, given = f"s3://{BUCKET}/run", [part for name in server.environment for part in ("--env", name)]
        submit = ["submit", place / "audit.yaml", "--out", url, "--address", head.address, *given]
        status, out, err = call(*submit, "--job-id", "first", "--follow")
        assert status == 0, err
        for command in ("follow", "status", "stop"):
            assert f"moe-audit {command} first --address {head.address}" in out
        assert "effects: " in out  # progress, as lines
        assert "\x1b" not in out
        folder = RunFolder(url)
        assert folder.dataset("tokens").count_rows() == 60
        assert folder.read_table("layers").num_rows > 0
        run = folder.require_run()
        assert run["specification"]["model"]["source"] == "./model"  # as written: the run can go on from here too
        assert run["environment"]["versions"]["moe-audit"]

        status, out, _ = call("status", url)
        assert status == 0
        assert re.search(r"effects .* 100%", out)
        status, out, _ = call("status", "first", "--address", head.address)
        assert status == 0
        assert "first: succeeded after" in out
        assert re.search(r"effects .* 100%", out)
        assert "result tables in" in out  # the last lines
        status, out, err = call("stop", "first", "--address", head.address)
        assert (status, err) == (0, "")
        assert "has ended already: succeeded" in out

        # The same audit again: another job id is needed.
        status, out, err = call(*submit, "--job-id", "first")
        assert (status, err.count("\n")) == (2, 1)
        assert "'first' is a job of this cluster already" in err


def test_a_mistake_that_only_the_cluster_can_see_has_its_own_status(
    place: Path, head: Head, client: JobClient, call: Call, tmp_path: Path
) -> None:
    status, out, err = call(
        "submit", place / "audit.yaml", "--out", tmp_path / "run", "--address", head.address, "--job-id", "mistaken",
        "--follow", "--set", "positions.sample=100000",
    )  # fmt: skip
    assert status == 2
    assert "positions.sample: 100000" in out
    assert "exit status 2" in err
    assert not (tmp_path / "run").exists()


def test_a_stopped_job_keeps_its_work_and_the_same_command_goes_on(
    place: Path, head: Head, client: JobClient, call: Call, tmp_path: Path
) -> None:
    submit = [
        "submit", place / "audit.yaml", "--out", tmp_path / "run", "--address", head.address, *LONG
    ]  # fmt: skip
    assert call(*submit, "--job-id", "stopped")[0] == 0
    wait_for(client, "stopped", "merge: 1/1")

    driver = next(
        process for process in psutil.process_iter(["cmdline"]) if f"{tmp_path}/run" in (process.info["cmdline"] or [])
    )
    driver.suspend()  # so that everything below happens in mid-run

    # Somebody who follows and leaves: the job stays.
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    status, out, err = call("follow", "stopped", "--address", head.address)
    assert status == 130
    assert "merge: 1/1" in out
    assert "stopped goes on without you" in err
    assert client.state("stopped").state == "running"

    # A second job on the same folder would do the same work.
    status, _, err = call(*submit, "--job-id", "second")
    assert (status, err.count("\n")) == (2, 1)
    assert "in use by the job stopped" in err

    threading.Timer(3, driver.resume).start()
    status, out, _ = call("stop", "stopped", "--address", head.address)
    assert status == 0
    found = re.search(r"stopped with (\d+) of (\d+) tasks committed", out)
    assert found, client.log("stopped")
    committed, tasks = int(found[1]), int(found[2])
    assert 0 < committed < tasks
    assert client.state("stopped").state == "stopped"
    folder = RunFolder(str(tmp_path / "run"))
    before = {manifest.commit: set(manifest.tasks) for manifest in folder.manifests()}
    assert sum(map(len, before.values())) == committed

    # Gone on with, over a connection that breaks.
    proxy = Proxy(urlsplit(head.address).port or 0)
    breaker = threading.Thread(
        target=lambda: (wait_for(client, "resumed", "Running entrypoint"), proxy.cut(seconds=1.5)), daemon=True
    )
    resumed = [proxy.address if part == head.address else part for part in submit]
    assert call(*resumed, "--job-id", "resumed")[0] == 0
    breaker.start()
    status, out, err = call("follow", "resumed", "--address", proxy.address)
    proxy.close()
    assert status == 0, err
    assert "is lost, looking for it" in err
    assert f"connected to {proxy.address} again" in err
    assert out == client.log("resumed")  # each line once
    after = {manifest.commit: set(manifest.tasks) for manifest in folder.manifests()}  # raises where a task is twice
    assert before.items() <= after.items()
    assert sum(map(len, after.values())) == tasks
    keys = folder.dataset("effects").to_table().select(
        ["sequence", "position", "layer", "unit", "slot", "intervention", "draw"]
    )  # fmt: skip
    assert keys.num_rows > 0
    assert keys.group_by(keys.column_names).aggregate([]).num_rows == keys.num_rows

    # What is wrong with the folder shows before anything is uploaded.
    status, out, err = call(*submit, "--set", "seed=1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "seed: " in err


def test_local_mistakes_end_before_anything_is_sent(place: Path, call: Call, tmp_path: Path) -> None:
    def refused(*arguments: object, out: object = tmp_path / "run") -> str:
        status, printed, err = call(
            "submit", place / "audit.yaml", "--out", out, "--address", "http://127.0.0.1:1", *arguments
        )
        assert (status, printed) == (2, "")
        assert err.startswith("moe-audit: ")
        assert err.count("\n") == 1
        return err

    assert "layers" in refused("--set", "layers=[7]")
    assert "model.source: './nowhere'" in refused("--set", "model.source=./nowhere").replace(str(place), ".")
    assert "corpus.sources.0.path: 'nowhere'" in refused("--set", "corpus.sources.0.path=nowhere")
    assert "--env: 'NO_SUCH_NAME' is not set" in refused("--env", "NO_SUCH_NAME")
    assert "--on-cluster: 'shared' is not absolute" in refused("--on-cluster", "shared")
    assert "nobody answers at http://127.0.0.1:1 (Connection refused)" in refused()


def test_paths_of_one_machine_are_refused_on_a_cluster_of_others(
    place: Path, head: Head, client: JobClient, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_client.psutil, "net_if_addrs", dict)  # this machine has none of the nodes' addresses
    submit = ["submit", place / "audit.yaml", "--address", head.address, "--out"]
    status, _, err = call(*submit, tmp_path / "run")
    assert (status, err.count("\n")) == (2, 1)
    assert "the cluster's nodes are other machines" in err
    assert f"--on-cluster {tmp_path}" in err
    status, _, err = call(*submit, "s4://bucket/run")
    assert (status, err.count("\n")) == (2, 1)
    assert "--out: 's4://bucket/run' cannot be used" in err


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://127.0.0.1:10001", "Ray's client server"),
        ("127.0.0.1:8265", "is not an http:// or https:// address"),
        ("http://127.0.0.1:6379", "where Ray's nodes meet"),
        ("http://", "is not an http:// or https:// address"),
        ("http://127.0.0.1:99999", "is not an http:// or https:// address"),
    ],
)
def test_an_address_that_is_no_dashboard(call: Call, address: str, says: str) -> None:
    status, out, err = call("status", "some-job", "--address", address)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert "http://127.0.0.1:8265" in err


@pytest.fixture
def look_for_token() -> Iterator[Callable[[], None]]:
    """Ray looks for a token once in a process; called, it looks again. Request it before ``monkeypatch``."""
    found = AuthenticationTokenLoader.instance()
    yield found.reset_cache
    found.reset_cache()


def test_the_address_that_is_given_counts_and_the_token_is_asked_for(
    head: Head,
    client: JobClient,
    call: Call,
    tmp_path: Path,
    look_for_token: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ray's own client prefers these, silently.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert JobClient(head.address + "/").address == head.address
    status, _, err = call("status", "nobody", "--address", head.address)
    assert (status, err.count("\n")) == (2, 1)
    assert "nobody does not exist" in err

    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    look_for_token()
    status, _, err = call("status", "nobody", "--address", head.address)
    assert (status, err.count("\n")) == (2, 1)
    assert "refused the token" in err
    assert "wrong" not in err.replace("wrong token", "")

    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    look_for_token()
    status, _, err = call("status", "nobody", "--address", head.address)
    assert (status, err.count("\n")) == (2, 1)
    assert "there is none; set RAY_AUTH_TOKEN" in err
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "token").write_text(head.token + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    look_for_token()
    assert "does not exist on the cluster" in call("status", "nobody", "--address", head.address)[2]
    (tmp_path / "token").unlink()
    look_for_token()
    assert "RAY_AUTH_TOKEN_PATH" in call("status", "nobody", "--address", head.address)[2]


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [("succeeded", 0, 0), ("failed", 1, 1), ("failed", 2, 2), ("failed", -9, 137), ("failed", None, 1),
     ("stopped", None, 143)],
)  # fmt: skip
def test_an_exit_status_is_the_audits_own(state: str, code: int | None, status: int) -> None:
    job = JobState(id="j", state=state, message="", exit_code=code, metadata={}, started=None, ended=None)
    assert job.exit_status == status


def test_job_ids_are_readable_and_differ() -> None:
    one, other = (job_client.new_job_id("OLMoE 1B/7B: a test") for _ in range(2))
    assert re.fullmatch(r"OLMoE-1B-7B-a-test-\d{8}-\d{6}-[0-9a-f]{4}", one)
    assert one != other


@pytest.mark.full
def test_rays_own_command_starts_the_program(head: Head, tmp_path: Path) -> None:
    """As the program's help says, from a checkout; the upload leaves out what git ignores."""
    root, checkout = Path(__file__).resolve().parents[2], tmp_path / "checkout"
    checkout.mkdir()
    for name in ("audit", "cluster", "jobs", "configs"):
        shutil.copytree(root / name, checkout / name)
    (checkout / ".gitignore").write_text("/runs/\n")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "large").write_bytes(os.urandom(101 << 20))
    found = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.address),
            *("--working-dir", ".", "--", "python", "-m", "jobs.run_audit", "--config", "configs/demo.yaml"),
            *("--out", str(tmp_path / "run"), "--set", "corpus.sources.0.documents_per_domain=4"),
            *("--set", "cluster.max_groups=1"),
        ],
        cwd=checkout, env={**os.environ, "RAY_AUTH_TOKEN": head.token, "RAY_AUTH_MODE": "token"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert RunFolder(str(tmp_path / "run")).read_table("layers").num_rows == 6
