"""Random kills every few seconds until an audit is done, many times over: what is lost of its rows.

    python -m benchmarks.chaos --runs 20 --markdown benchmarks/2026-01-01_chaos.md

Each run audits thirty tasks of 0.4 seconds with two groups on a cluster of a head and two nodes on this machine. A
generator, seeded by the run's number, chooses when and what is killed (SIGKILL): a rank at work, a whole node (another
one joins), a process that writes tables or reduces them, or the driver. A driver that ended before the audit was done,
by a kill or with an exit status that is not 0, is started again by the same command. The head is never killed: with it
the cluster is gone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil

from benchmarks.faults.audit import Audit, Losses
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.trial import Trial

WORKERS, WORKER_CPUS = 2, 3
PAUSE_SECONDS = 1.0, 5.0  # between two kills
LOOK_SECONDS = 3.0  # for so long a target is waited for
MOST_STARTS = 60  # then the run is not going to end

Target = Literal["rank", "node", "writer", "driver"]
SHARES: Mapping[Target, int] = {"rank": 4, "node": 2, "writer": 2, "driver": 2}
# Workers without work and ranks; the agents, without which a node ends itself.
_NO_WRITERS = ("ray::IDLE", "ray::Rank", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``failures``: starts that ended with a status that is not 0, though nobody killed the driver."""

    seed: int
    kills: Counter[Target]
    starts: int
    failures: int
    losses: Losses
    results: Mapping[str, bytes]
    seconds: float


def trial(place: Path) -> Trial:
    return Trial(folder=str(place / "run"), state=str(place / "state"), tasks=30, seconds=0.4)


def chaos(seed: int, nodes: Nodes, place: Path) -> Run:
    """Run one audit to its end among kills. Raises AssertionError where it does not get there."""
    generator = random.Random(seed)
    kills: Counter[Target] = Counter()
    failures = 0
    audit = Audit(trial(place), nodes.environment())
    begun = time.monotonic()
    audit.start()
    try:
        while True:
            pause = generator.uniform(*PAUSE_SECONDS)
            (target,) = generator.choices(list(SHARES), list(SHARES.values()))
            status = audit.wait(pause)
            if status == 0:
                break
            if status is None:
                kills[target] += _kill(target, generator, audit, nodes)
            if audit.process.returncode == 0:
                break
            if audit.process.returncode is not None:
                failures += audit.process.returncode > 0
                assert audit.starts < MOST_STARTS, "\n".join(audit.said())
                audit.start()
    finally:
        audit.kill()
    seconds = time.monotonic() - begun
    return Run(
        seed=seed,
        kills=kills,
        starts=audit.starts,
        failures=failures,
        losses=audit.losses(),
        results=audit.results(),
        seconds=seconds,
    )


def _kill(target: Target, generator: random.Random, audit: Audit, nodes: Nodes) -> bool:
    """Whether there was something to kill."""
    if target == "driver":
        audit.kill()
        return True
    if target == "node":
        nodes.kill(generator.choice(nodes.workers))
        nodes.add(WORKER_CPUS)
        return True
    end = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < end and audit.wait(0.05) is None:
        there = sorted(audit.running()) if target == "rank" else _writers(audit, nodes)
        with suppress(ProcessLookupError):  # it ended by itself in the meantime
            if there:
                os.kill(generator.choice(there), signal.SIGKILL)
                return True
    return False


def _writers(audit: Audit, nodes: Nodes) -> list[int]:
    """The workers that write tables or reduce them: all that are at work and are no ranks."""
    ranks = {entry.pid for entry in audit.journal()}
    found = []
    for pid in sorted(pid for node in nodes.workers for pid in node.pids() if pid not in ranks):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(psutil.Process(pid).cmdline())
            if title.startswith("ray::") and not title.startswith(_NO_WRITERS):
                found.append(pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many audits; their seeds are 0, 1, ...")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rows = []
    with Nodes() as nodes, tempfile.TemporaryDirectory(prefix="chaos-") as place:
        for _ in range(WORKERS):
            nodes.add(WORKER_CPUS)
        calm = Audit(trial(Path(place, "calm")), nodes.environment())
        begun = time.monotonic()
        assert calm.start().finish() == 0, "\n".join(calm.said())
        calm_seconds = time.monotonic() - begun
        for seed in range(arguments.runs):
            run = chaos(seed, nodes, Path(place, str(seed)))
            row = {
                "run": seed,
                **{f"{target} kills": run.kills[target] for target in SHARES},
                "driver starts": run.starts,
                "of these failed": run.failures,
                "rows lost": run.losses.lost,
                "rows twice": run.losses.twice,
                "files left over": run.losses.orphans,
                "tables identical": "yes" if run.results == calm.results() and not run.losses.changed else "NO",
                "seconds": round(run.seconds, 1),
            }
            print(row, flush=True)
            rows.append(row)
    table = pd.DataFrame(rows)
    whole = (table["rows lost"] + table["rows twice"] + table["files left over"] == 0) & (
        table["tables identical"] == "yes"
    )
    text = (
        f"`python -m benchmarks.chaos --runs {arguments.runs}`\n\n```\n{table.to_string(index=False)}\n```\n\n"
        f"Whole: {whole.sum()} of {len(table)} runs. Without kills the audit takes {calm_seconds:.1f} s.\n"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
