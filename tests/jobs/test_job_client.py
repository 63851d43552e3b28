"""A head whose agent is slow to come up, as a few answers of the Jobs API's own shape."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from cluster.submission import job_client
from cluster.submission.job_client import JobClient, JobError


class Dashboard(ThreadingHTTPServer):
    """Refuses the first ``refusals`` jobs."""

    def __init__(self, refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refusals = refusals
        self.taken: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "s"}
        self._answer(200, json.dumps(version if self.path == "/api/version" else []))

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"]
        if self.server.refusals > 0:
            self.server.refusals -= 1
            self._answer(500, "No available agent to submit job, please try again later.")
        else:
            self.server.taken.append(job)
            self._answer(200, json.dumps({"job_id": job, "submission_id": job}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(job_client, "_POLL_SECONDS", 0.01)
    with Dashboard(refusals=2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def submit(dashboard: Dashboard, package: Path) -> None:
    package.write_bytes(b"PK")
    JobClient(dashboard.address).submit("j", "exec python", package=package, metadata={}, env={})


def test_a_head_that_takes_no_jobs_yet_is_waited_for(dashboard: Dashboard, tmp_path: Path) -> None:
    submit(dashboard, tmp_path / "job.zip")
    assert dashboard.taken == ["j"]
    assert dashboard.refusals == 0


def test_a_head_that_never_takes_jobs_is_an_error_that_says_why(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_client, "_AGENT_SECONDS", 0.05)
    dashboard.refusals = 10**9
    with pytest.raises(JobError, match=r"has taken no job for 0\.05 s: .*--dashboard-agent-listen-port=0"):
        submit(dashboard, tmp_path / "job.zip")
    assert dashboard.taken == []
