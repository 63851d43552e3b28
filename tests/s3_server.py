"""A real S3 server of this process on a free port: moto's, with a gate before it that counts and refuses requests."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
_STATUS = {"AccessDenied": "403 Forbidden", "SlowDown": "503 Service Unavailable"}


@dataclass
class Refusal:
    """Answers ``code`` to requests whose "METHOD /path" matches, from number ``after`` on, at most ``times``."""

    pattern: str
    code: str
    after: int = 0
    times: float = float("inf")
    seen: int = 0
    refused: int = 0

    def applies(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        if self.seen <= self.after or self.refused >= self.times:
            return False
        self.refused += 1
        return True


@dataclass
class Hold:
    """A request that waits until the block is left; ``reached`` when there is one."""

    pattern: str
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class S3Server:
    """``environment``: what a process needs to reach the server. ``requests``: "METHOD /bucket/key", in order."""

    requests: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        with self._lock:
            self.requests.append(request)
            refusal = next((refusal for refusal in self.refusals if refusal.applies(request)), None)
        for hold in [hold for hold in self.holds if re.search(hold.pattern, request)]:
            hold.reached.set()
            hold.released.wait()
        if refusal is None:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{refusal.code}</Code><Message>{refusal.code}</Message></Error>"
        start_response(_STATUS[refusal.code], [("Content-Type", "application/xml")])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body.encode()]

    @contextmanager
    def refusing(self, pattern: str, code: str, *, after: int = 0, times: float = float("inf")) -> Iterator[Refusal]:
        refusal = Refusal(pattern, code, after, times)
        self.refusals.append(refusal)
        try:
            yield refusal
        finally:
            self.refusals.remove(refusal)

    @contextmanager
    def holding(self, pattern: str) -> Iterator[Hold]:
        hold = Hold(pattern)
        self.holds.append(hold)
        try:
            yield hold
        finally:
            self.holds.remove(hold)
            hold.released.set()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with an empty bucket, reached by this process and those it starts."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
    served = S3Server()
    server = make_server("127.0.0.1", 0, served, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in served.environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            # What an earlier server of this process held, this one would hold too.
            urlopen(f"{served.environment['AWS_ENDPOINT_URL']}/moto-api/reset", data=b"").close()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield served
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
