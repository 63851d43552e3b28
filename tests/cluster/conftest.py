"""One Ray cluster per module, in a short folder of its own: pytest's tmp_path is too long for Ray's sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import ray_session

# Ray's workers must find the stub worker, whose module lies next to this file, and benchmarks, which it imports.
HERE = Path(__file__).parent
SEARCH = (str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, SEARCH))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with ray_session(cpus=2):
        yield
