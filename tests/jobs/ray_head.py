"""A real Ray head as a child process, with a dashboard on loopback, a token, and ports and folders of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.nodes import free_port


@dataclass(frozen=True)
class Head:
    address: str
    token: str


@contextmanager
def ray_head(cpus: int) -> Iterator[Head]:
    """Ends with everything it has started, by process id."""
    token, port = secrets.token_hex(16), free_port()
    folder = tempfile.mkdtemp(prefix="m", dir="/tmp")  # short, for Ray's sockets
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--num-cpus={cpus}", "--object-store-memory=150000000", f"--temp-dir={folder}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--port={free_port()}"),
        # Any free port: an agent whose port somebody else has taken meanwhile stays up, and takes no jobs.
        *("--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"),
    ]
    mine = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
        # As where the environment that Ray runs in is activated: a job's entrypoint says `python`.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
    }
    # What tests of this process have set for clusters of their own is not this one's.
    others = ("RAY_ADDRESS", "PYTHONPATH", "RAY_enable_metrics_collection", "RAY_worker_niceness")
    environment = {name: value for name, value in os.environ.items() if name not in others} | mine
    with open(Path(folder, "head.log"), "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(port, token, process)
        yield Head(f"http://127.0.0.1:{port}", token)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for child in [process, *psutil.wait_procs(children, timeout=1)[1]]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


class Proxy:
    """Forwards connections to a port of this machine, until it is cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._refuse = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Break every connection, and refuse new ones for so long."""
        self._refuse = True
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open = []
        time.sleep(seconds)
        self._refuse = False

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._refuse:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _wait(port: int, token: str, process: subprocess.Popen[bytes]) -> None:
    """Until the Jobs API answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no Ray head came up (exit status {process.poll()})")
