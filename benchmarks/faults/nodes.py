"""A Ray cluster of several nodes on this machine, each a process tree of its own that is ended by its process ids.

Ports are free ones and every file lies in one short folder (socket paths end at 107 bytes), so that it meddles with no
other cluster of the machine. A node's CPUs are what it is told to have.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import ray.util

ROOT = Path(__file__).resolve().parents[2]
# A dead node is known as such after a second and a half; by default after 15, and until then Ray places actors on it.
_HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
_START_SECONDS = 60.0
_STORE_BYTES = 150 << 20


def free_port() -> int:
    """Below the ports that the system hands out: one of those may be gone before Ray has come to open it."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


# Ray's fake provider of nodes takes the head for granted under this name.
_FAKE_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


@dataclass(frozen=True, slots=True)
class Node:
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """The node's processes, its workers included."""
        return [self.process.pid, *(child.pid for child in _children(self.process.pid))]


class Nodes:
    """A head of ``head_cpus`` CPUs, and whatever :meth:`add` adds. Close it, or use it as a context manager.

    ``autoscaling``: what Ray's autoscaler is to be told of the cluster; without it there is no autoscaler.
    """

    def __init__(
        self,
        head_cpus: int = 0,
        *,
        autoscaling: Mapping[str, object] | None = None,
        port: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="m", dir="/tmp")
        port = port or free_port()
        self.address = f"{ray.util.get_node_ip_address()}:{port}"
        self._variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": self._folder,
            "RAY_enable_metrics_collection": "0",
            "RAY_worker_niceness": "0",  # as cluster.session has it
            "RAY_enable_worker_prestart": "0",  # a process per CPU that nobody asked for
            "RAY_prestart_worker_first_driver": "0",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "DASHBOARD_METRIC_PORT": str(free_port()),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **(variables or {}),
        }
        self._started = 0
        self.workers: list[Node] = []
        arguments = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        arguments += [f"--ray-client-server-port={free_port()}", f"--system-config={json.dumps(_HEALTH)}"]
        if autoscaling is not None:
            file = Path(self._folder, "autoscaling.json")
            file.write_text(json.dumps(autoscaling), encoding="utf-8")
            arguments.append(f"--autoscaling-config={file}")
        try:
            self.head = self._start(head_cpus, arguments)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def environment(self) -> dict[str, str]:
        """The environment of a process that is to join this cluster."""
        return {**os.environ, **self._variables, "RAY_ADDRESS": self.address}

    def add(self, cpus: int) -> Node:
        """One node more; returns when it has joined."""
        node = self._start(cpus, [f"--address={self.address}"])
        self.workers.append(node)
        return node

    def kill(self, node: Node) -> None:
        """SIGKILL to every process of a node, as when its machine is taken away."""
        self.workers.remove(node)
        _end(node)

    def node_of(self, pid: int) -> Node:
        """The node a Ray worker runs on."""
        above = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(node for node in [self.head, *self.workers] if node.process.pid in above)

    def raylets(self) -> int:
        """How many nodes there are, those of the autoscaler included."""
        found = {child.pid: child for node in [self.head, *self.workers] for child in _children(node.process.pid)}
        raylets: dict[int, int] = {}
        for pid, child in found.items():
            with suppress(psutil.NoSuchProcess):  # it may have ended since it was listed
                if child.name() == "raylet":
                    raylets[pid] = child.ppid()
        # Between its fork and its exec what a raylet starts looks like another one.
        return sum(parent not in raylets for parent in raylets.values())

    def close(self) -> None:
        """End every node, the head last, and delete their files."""
        for node in [*self.workers, self.head]:  # asked politely, a node drains for half a minute
            _end(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, cpus: int, arguments: list[str]) -> Node:
        log = Path(self._folder, f"node-{self._started}.log")
        self._started += 1
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
        command += [f"--num-cpus={cpus}", f"--object-store-memory={_STORE_BYTES}"]
        # 0: any free port, where workers of several nodes would take the same ones.
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command.append("--include-log-monitor=false")
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                env={key: value for key, value in {**os.environ, **self._variables}.items() if key != "RAY_ADDRESS"},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        node = Node(process)
        end = time.monotonic() + _START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                _end(node)
                raise RuntimeError(f"a Ray node did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        return node


def autoscaled(*, head_cpus: int, worker_cpus: int, max_workers: int, idle_seconds: float) -> Nodes:
    """A head whose autoscaler starts nodes of ``worker_cpus`` CPUs when they are asked for, and ends those idle for so
    long.
    """
    port = free_port()
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        "head_node_id": _FAKE_HEAD,
        "launch_multiple": True,
    }
    head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    worker = {"resources": {"CPU": worker_cpus}, "node_config": {}, "min_workers": 0, "max_workers": max_workers}
    commands = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    commands += ["head_start_ray_commands", "worker_start_ray_commands"]
    settings = {
        "cluster_name": "faults",
        "max_workers": max_workers,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_seconds / 60,
        "provider": provider,
        "auth": {},
        "head_node_type": "ray.head.default",  # as the provider calls it
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{name: [] for name in commands},
    }
    variables = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTOSCALER_RECONCILE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # the first one does not end idle nodes of this provider
        "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD,
    }
    return Nodes(head_cpus, autoscaling=settings, port=port, variables=variables)


def _end_with_parent() -> None:
    """Linux ends this process when the thread that started it is gone, however it went; Ray's go with it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _end(node: Node) -> None:
    for pid in node.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.process.wait()
