"""Jobs on a cluster, through the Jobs API of its dashboard: submit, watch, stop. Every failure is one sentence."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

STOP_SECONDS = 120  # what a job that is stopped has to commit what is finished; Ray's own default is 3
_REQUEST_SECONDS = 30.0
_QUIET_SECONDS = 60.0  # a log silent for so long is asked for anew: the connection may be dead without saying so
_PATIENCE_SECONDS = 300.0  # how long a lost cluster is looked for
_POLL_SECONDS = 1.0
_AGENT_SECONDS = 120.0  # a head takes jobs only once its agent has come up, which a loaded machine is slow with
_OVER = ("succeeded", "failed", "stopped")
_TOKEN_FILE = "~/.ray/auth_token"


class JobError(Exception):
    """The cluster cannot do what was asked; the message is one sentence that says what would be right."""


class UnreachableError(JobError):
    """Nobody answers at the address, or no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job as the cluster knows it. Times are Unix seconds."""

    id: str
    state: str  # pending, running, succeeded, failed or stopped
    message: str
    exit_code: int | None
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        return self.state in _OVER

    @property
    def exit_status(self) -> int:
        """What the audit itself ended with, as a shell would say it; 1 where it never began or was lost."""
        if self.state == "stopped":
            return 143
        if self.exit_code is None:
            return 0 if self.state == "succeeded" else 1
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


class JobClient:
    """The jobs of one cluster. Making one asks the dashboard at ``address`` for its version.

    Raises JobError for an address that is no dashboard's, a missing or wrong token, and another minor version of Ray.
    """

    def __init__(self, address: str) -> None:
        self.address = _dashboard(address)
        for name in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and every closed connection
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        token = find_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to the address that is given
            try:
                self._client = _Client(self.address, headers=headers)
            except AuthenticationError:
                raise JobError(_refused(401)) from None
            except (RuntimeError, ValueError, KeyError) as error:
                asked = f"--address: {self.address} does not answer as a Ray dashboard ({_first_line(error)})"
                raise JobError(f"{asked}; name the dashboard's address, such as http://127.0.0.1:8265") from None
        theirs, ours = str(self._client._server_ray_version), ray.__version__
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise JobError(
                f"--address: the cluster at {self.address} runs Ray {theirs}, this moe-audit needs {ours}; start the "
                f"cluster with ray=={ours}"
            )

    def submit(
        self, job: str, entrypoint: str, *, package: Path, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        """Upload ``package``, a zip file whose content becomes the working folder, and start the entrypoint in it.

        A head that has only just started is waited for. Raises JobError for an id that is taken.
        """
        taken = JobError(f"--job-id: {job!r} is a job of this cluster already; name another, or leave it out")
        if any(state.id == job for state in self.states()):
            raise taken
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env={"working_dir": str(package), "env_vars": dict(env)},
                    metadata=dict(metadata),
                )
                return
            except JobError as error:
                if "already exists" in str(error):  # somebody else was faster
                    raise taken from None
                if "No available agent" not in str(error):
                    raise
            if time.monotonic() > deadline:
                raise JobError(
                    f"the cluster at {self.address} has taken no job for {_AGENT_SECONDS:g} s: the agent of its head "
                    "is not up, most often because another cluster on that machine has its port; start the head with "
                    "--dashboard-agent-listen-port=0, or see dashboard_agent.log there"
                )
            time.sleep(_POLL_SECONDS)

    def state(self, job: str) -> JobState:
        """Raises JobError for a job the cluster does not know."""
        return _state(self._client.get_job_info(job))

    def states(self) -> list[JobState]:
        """Every submitted job that the cluster remembers."""
        return [_state(details) for details in self._client.list_jobs() if details.submission_id]

    def log(self, job: str) -> str:
        """Everything the job has printed."""
        return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> JobState:
        """Ask the job to end and wait until it has: at most its grace time and what Ray takes to notice."""
        self._client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS + _REQUEST_SECONDS
        while not (state := self.state(job)).over:
            if time.monotonic() > deadline:
                raise JobError(f"{job} has not ended {STOP_SECONDS + _REQUEST_SECONDS:g} s after it was asked to")
            time.sleep(_POLL_SECONDS)
        return state

    def follow(self, job: str, write: Callable[[str], None], say: Callable[[str], None]) -> JobState:
        """Give ``write`` what the job prints, from its beginning, each character once, until the job is over.

        A lost connection is said and made again; raises UnreachableError after five minutes without one.
        """
        printed = _Printed(write)
        lost: float | None = None
        while True:
            try:
                state = self.state(job)
                if lost is not None:
                    say(f"connected to {self.address} again")
                    lost = None
                if state.over:
                    printed.begin()
                    printed.add(self.log(job))
                    return state
                asyncio.run(self._tail(job, printed))
            except (UnreachableError, aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:
                now = time.monotonic()
                if lost is None:
                    lost = now
                    say(f"the connection to {self.address} is lost, looking for it: {_first_line(error)}")
                elif now - lost > _PATIENCE_SECONDS:
                    raise UnreachableError(
                        f"{self.address} has not answered for {_PATIENCE_SECONDS:g} s; the job may still be running"
                    ) from None
                time.sleep(_POLL_SECONDS)

    async def _tail(self, job: str, printed: _Printed) -> None:
        printed.begin()
        async with aclosing(self._client.tail_job_logs(job)) as chunks:
            while True:
                try:
                    text = await asyncio.wait_for(anext(chunks, None), _QUIET_SECONDS)
                except TimeoutError:
                    return  # to ask for the state and begin again
                if text is None:
                    return
                printed.add(text)

    def is_this_machine(self) -> bool:
        """Whether every node of the cluster has an address of this machine. A tunnel makes a far one look near."""
        response = self._client._do_request("GET", "/api/v0/nodes?limit=10000")
        nodes = response.json()["data"]["result"]["result"]
        mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"} <= mine


def new_job_id(name: str) -> str:
    """A readable id that nobody else makes: the audit's name, the moment, four random characters."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "audit"
    return f"{readable}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def find_token() -> str | None:
    """The cluster's token, from where Ray looks for it. Raises JobError for a named file that cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or _TOKEN_FILE).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        if named is None:
            return None
        raise JobError(f"RAY_AUTH_TOKEN_PATH: {named!r} does not exist; name the file that holds the token") from None
    except OSError as error:
        raise JobError(f"the token file {str(path)!r} cannot be read ({error.strerror}); correct it") from None


class _Printed:
    """What of a log was written, so that a log that is sent again is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = self._seen = 0

    def begin(self) -> None:
        """The log comes from its beginning again."""
        self._seen = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        if new:
            self._write(new)
            self._written = self._seen


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a time limit on every request and a sentence for every refusal."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        limit = _REQUEST_SECONDS if options.get("data") is None else 20 * _REQUEST_SECONDS  # uploads take longer
        try:
            return super()._do_request(method, endpoint, timeout=limit, **options)
        except AuthenticationError as error:
            raise JobError(_refused(401 if "required" in str(error) else 403)) from None
        except OSError as error:  # all that the HTTP library raises
            raise UnreachableError(
                f"--address: nobody answers at {self._address} ({_first_line(error)}); is the cluster up, and the "
                "tunnel to it (ray dashboard ray_cluster.yaml, or kubectl port-forward)?"
            ) from None

    def _raise_error(self, response: Any) -> None:
        told = response.text.strip().splitlines() or [f"status {response.status_code}"]
        if response.status_code == 404 and "/jobs/" in response.url:
            raise JobError(f"{told[-1]} on the cluster at {self._address}; `ray job list` names those that do")
        raise JobError(f"the cluster at {self._address} refused ({response.status_code}): {told[-1]}")


def _state(details: JobDetails) -> JobState:
    seconds = {
        name: None if (moment := getattr(details, name)) is None else moment / 1000
        for name in ("start_time", "end_time")
    }
    return JobState(
        id=str(details.submission_id),
        state=str(details.status.value).lower(),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
        started=seconds["start_time"],
        ended=seconds["end_time"],
    )


def _dashboard(address: str) -> str:
    """The address without a slash at its end. Raises JobError for one that is not a dashboard's."""
    example = "name the dashboard's address, such as http://127.0.0.1:8265"
    parts = urlsplit(address)
    if parts.scheme == "ray":
        raise JobError(f"--address: {address!r} is the address of Ray's client server; {example}")
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise JobError(f"--address: {address!r} is not an http:// or https:// address; {example}")
    if parts.port == 6379:
        raise JobError(f"--address: {address!r} is the port where Ray's nodes meet; {example}")
    return address.rstrip("/")


def _refused(status: int) -> str:
    if status == 401:
        return (
            "the cluster asks for a token and there is none; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file, "
            f"or put it in {_TOKEN_FILE}"
        )
    return (
        "the cluster refused the token; it is not the one the cluster was started with: look at RAY_AUTH_TOKEN, "
        f"RAY_AUTH_TOKEN_PATH and {_TOKEN_FILE}, the first of them that is there counts"
    )


@contextmanager
def _without(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _first_line(error: BaseException) -> str:
    """What went wrong, in the operating system's words where it has any: libraries wrap them several times over."""
    text, cause = str(error).strip(), error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
    return text.splitlines()[0] if text else type(error).__name__
