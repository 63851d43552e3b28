"""Ray's workers must find the stub worker, whose module lies next to this file, and benchmarks, which it imports."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
SEARCH = (str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, SEARCH))
