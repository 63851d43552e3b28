"""A session on this machine, in a process of its own that prints what others could see and reach of it, as JSON."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import psutil
import ray

from cluster.session import ray_session

ATTEMPT = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
    print("connected")
except Exception as error:
    print(type(error).__name__)
"""


def attempt(**environment: str) -> str:
    """What somebody gets who connects with this environment."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", ATTEMPT, ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


@ray.remote
def nothing() -> None:
    pass


def main() -> None:
    with ray_session(1):
        ray.get(nothing.remote())  # so that there is a worker
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        token = os.environ["RAY_AUTH_TOKEN"]
        scratch = os.path.dirname(ray._private.worker._global_node.get_temp_dir_path())
        found = {
            "processes": len(processes),
            "listening": sorted(
                {
                    connection.laddr.ip
                    for process in processes
                    for connection in process.net_connections(kind="inet")
                    if connection.status == psutil.CONN_LISTEN
                }
            ),
            "mode": stat.filemode(os.stat(scratch).st_mode),
            "on a command line": any(token in " ".join(process.cmdline()) for process in processes),
            "in files": subprocess.run(["grep", "-rl", token, scratch], capture_output=True, text=True).stdout,
            "no token": attempt(RAY_AUTH_MODE="disabled"),
            "wrong token": attempt(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="wrong"),
            "right token": attempt(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
        }
    print(json.dumps(found | {"left": os.path.exists(scratch)}))


if __name__ == "__main__":
    main()
