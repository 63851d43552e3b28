"""What going through Ray costs, and what one-thread groups give over one process with two threads.

    python -m benchmarks.through_ray --minutes 5 --markdown benchmarks/2026-01-01_through_ray.md

One after another in one run: by one process with two threads, by two bare one-thread processes, and by two one-thread
groups through Ray (driver, object store, commits to Parquet and all). Ray does every task; the bare processes do
every sixteenth, spread over the whole, after one task to warm up, before and after Ray. A task of short sentences takes
longer per effect than one of long ones, so what is compared is predicted work per second, shown as effects at the
audit's mean work per effect. Ray's rate is the slope of finished work over time without its first 30 seconds and its
last tasks: the steady part. Start-up is reported apart. The model is the OLMoE-shaped benchmark model, the text the
demo's held-out documents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pandas as pd
import transformers
from scipy.stats import linregress
from transformers import AutoTokenizer

from audit.config import AuditConfig
from audit.demo import CHECKPOINT
from audit.runfolder import RunFolder
from benchmarks.effects import WIDE
from benchmarks.model import olmoe_shaped
from cluster.display import NoDisplay
from cluster.planning.plan import prepare
from cluster.run import Job, execute
from cluster.tasks import Task

EFFECTS_PER_MINUTE = 600_000  # generous: decides how much text is audited
WARM_UP_SECONDS = 30.0


def write_checkpoint(folder: Path) -> None:
    """The benchmark model with the demo's tokenizer, whose ids all lie in its vocabulary."""
    olmoe_shaped(WIDE).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)


def specification(checkpoint: Path, documents: int, threads: int) -> AuditConfig:
    """An audit of every layer, expert and position of the demo's held-out documents."""
    data = {
        "model": {"source": str(checkpoint)},
        "corpus": {"sources": [{"kind": "demo", "documents_per_domain": documents}], "max_tokens": 256},
        "calibration": {"documents": 3},
        "engine": {"threads": threads},
        "cluster": {"max_groups": 2 if threads == 1 else 1},
    }
    return AuditConfig.parse(data, checkpoint)


def measuring(job: Job) -> list[Task]:
    """The tasks that measure effects."""
    return [task for _, stage in job.stages for task in stage if task.kind == "measure"]


def bare(
    config: AuditConfig, resolved: dict[str, object], share: slice, together: Barrier, rates: Queue[float]
) -> None:
    """One process that runs its share of the tasks without Ray, and reports predicted operations per second."""
    transformers.logging.set_verbosity_error()
    job = prepare(config, resolved)
    tasks, worker = measuring(job), job.make_worker("unused")
    worker.run(tasks[0], 1)  # warm up
    together.wait()
    start = time.perf_counter()
    for task in tasks[share]:
        worker.run(task, 1)
    rates.put(sum(task.flops for task in tasks[share]) / (time.perf_counter() - start))


def bare_rate(config: AuditConfig, resolved: dict[str, object], shares: Sequence[slice]) -> float:
    """Predicted operations per second of one process per share, all at once."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(len(shares)), context.Queue()
    processes = [context.Process(target=bare, args=(config, resolved, share, together, rates)) for share in shares]
    for process in processes:
        process.start()
    found = [rates.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughRay:
    """``rate``: predicted operations per second of the steady part, ``steady`` seconds long; ``before``: seconds until
    the first effect task began; ``rows``: effects in all."""

    rate: float
    steady: float
    before: float
    rows: int


def ray_rate(job: Job) -> ThroughRay:
    """The job through Ray."""
    work = sum(task.flops for task in measuring(job))
    folder = tempfile.mkdtemp(prefix="through-ray-")
    start = time.time()
    outcome = execute(job, RunFolder(folder), NoDisplay())
    assert outcome.exit_status == 0, outcome
    lines = [json.loads(line) for line in (Path(folder) / "progress.jsonl").read_text().splitlines()]
    effects = pd.DataFrame([line for line in lines if line["stage"] == "effects"])
    begun = effects["time"].iloc[0]
    steady = effects[(effects["time"] > begun + WARM_UP_SECONDS) & (effects["tasks_done"] < effects["tasks"] - 4)]
    slope = linregress(steady["time"], steady["share"]).slope
    return ThroughRay(
        rate=float(slope) * work,
        steady=float(steady["time"].iloc[-1] - steady["time"].iloc[0]),
        before=float(begun - start),
        rows=int(effects["rows"].iloc[-1]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long the part through Ray takes")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    checkpoint = Path(tempfile.mkdtemp(prefix="through-ray-model-"))
    write_checkpoint(checkpoint)
    documents = max(4, round(arguments.minutes * EFFECTS_PER_MINUTE / (3 * 180 * 16 * 8)))
    one, two = specification(checkpoint, documents, 1), specification(checkpoint, documents, 2)
    job = prepare(one)
    resolved = dict(job.identity["resolved"])
    tasks = measuring(job)
    per_effect = sum(task.flops for task in tasks) / sum(task.rows for task in tasks)
    alone, both = [slice(0, None, 16)], [slice(0, None, 16), slice(8, None, 16)]
    single = bare_rate(two, resolved, alone) / per_effect
    print(f"one process, two threads: {single:,.0f} effects/s", flush=True)
    pair = bare_rate(one, resolved, both) / per_effect
    print(f"two bare one-thread processes: {pair:,.0f} effects/s", flush=True)
    through = ray_rate(job)
    steady = through.rate / per_effect
    print(f"two one-thread groups through Ray: {steady:,.0f} effects/s", flush=True)
    again = bare_rate(one, resolved, both) / per_effect
    single_again = bare_rate(two, resolved, alone) / per_effect
    table = pd.DataFrame(
        [
            {"how": "one process, two threads, before", "effects/s": round(single)},
            {"how": "two bare one-thread processes, before", "effects/s": round(pair)},
            {"how": "two one-thread groups through Ray", "effects/s": round(steady)},
            {"how": "two bare one-thread processes, after", "effects/s": round(again)},
            {"how": "one process, two threads, after", "effects/s": round(single_again)},
        ]
    )
    text = (
        f"`python -m benchmarks.through_ray --minutes {arguments.minutes:g}`\n\n"
        f"```\n{table.to_string(index=False)}\n```\n\n"
        f"Through Ray against one process with two threads: {2 * steady / (single + single_again):.2f} times.\n"
        f"Through Ray against bare processes: {2 * steady / (pair + again):.1%} of their rate, over "
        f"{through.steady:.0f} s of steady work ({through.rows:,} effects in all).\n"
        f"Before the first effect task: {through.before:.1f} s (model, Ray, groups, calibration).\n"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
