"""What the fixtures of the command line's tests are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Call = Callable[..., tuple[int, str, str]]
"""Arguments of ``moe-audit`` in; exit status, standard output and standard error out."""

Cluster = Callable[[int], AbstractContextManager[None]]
"""CPUs in; a context on a Ray cluster that declares so many."""
