"""One Ray of this machine for the tests of a process: to start one takes longer than most of them."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout

import ray

from cluster.session import ray_session


class SharedRay:
    """Open from the first test that asks for it until one needs a cluster of its own, or none."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def open(self) -> None:
        if not ray.is_initialized():
            # A session silences what is printed in it, and gives back the stream it has found.
            with redirect_stdout(sys.stdout):
                self._open.enter_context(ray_session(cpus=2))

    def close(self) -> None:
        with redirect_stdout(sys.stdout):
            self._open.close()
