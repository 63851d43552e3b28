"""What going through Ray costs, and what one-thread replicas give over one process with two threads.

    python -m benchmarks.through_ray --minutes 5 --markdown benchmarks/2026-01-01_through_ray.md

The same tasks, one after another in one run: by one process with two threads, by two bare one-thread processes, and by
two one-thread replicas through Ray (driver, object store, commits to Parquet and all). The rate is that of the steady
part; start-up is reported apart. The model is the OLMoE-shaped benchmark model, the text the demo's held-out documents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pandas as pd
import transformers
from transformers import AutoTokenizer

from audit.config import AuditConfig
from audit.demo import CHECKPOINT
from audit.runfolder import RunFolder
from benchmarks.effects import WIDE
from benchmarks.model import olmoe_shaped
from cluster.display import NoDisplay
from cluster.engine_worker import EngineWorker
from cluster.plan import prepare
from cluster.run import execute

EFFECTS_PER_MINUTE = 600_000  # generous: decides how much text is audited


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
        "cluster": {"replicas": 2 if threads == 1 else 1},
    }
    return AuditConfig.parse(data, checkpoint)


def bare(config: AuditConfig, resolved: dict[str, object], share: slice, together: Barrier, rates: object) -> None:
    """One process that runs its share of the tasks without Ray, and reports rows and seconds."""
    transformers.logging.set_verbosity_error()
    job = prepare(config, resolved)
    worker = EngineWorker(config, resolved, ("code", "prose", "math"), "unused")
    tasks = [task for _, stage in job.stages for task in stage if task.kind == "measure"]
    worker.run(tasks[0], 1)  # warm up
    together.wait()
    start = time.perf_counter()
    rows = sum(worker.run(task, 1).tables["effects"].num_rows for task in tasks[share])
    rates.put((rows, time.perf_counter() - start))  # type: ignore[attr-defined]


def bare_rate(config: AuditConfig, resolved: dict[str, object], shares: Sequence[slice]) -> float:
    """Effects per second of one process per share, all at once."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(len(shares)), context.Queue()
    processes = [context.Process(target=bare, args=(config, resolved, share, together, rates)) for share in shares]
    for process in processes:
        process.start()
    found = [rates.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rows / seconds for rows, seconds in found))


def ray_rate(config: AuditConfig) -> tuple[float, float, float, int]:
    """Through Ray: steady effects per second, seconds before the first effect task, seconds in all, rows."""
    folder = tempfile.mkdtemp(prefix="through-ray-")
    start = time.time()
    outcome = execute(prepare(config), RunFolder(folder), NoDisplay())
    seconds = time.time() - start
    assert outcome.exit_status == 0, outcome
    lines = [json.loads(line) for line in (Path(folder) / "progress.jsonl").read_text().splitlines()]
    effects = [line for line in lines if line["stage"] == "effects"]
    last = effects[-1]
    steady = float(last["rows_per_second"])
    before = effects[0]["time"] - start
    return steady, before, seconds, int(last["rows"])


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
    tasks = sum(task.kind == "measure" for _, stage in job.stages for task in stage)
    third = max(4, tasks // 4)
    single = bare_rate(two, resolved, [slice(0, third)])
    pair = bare_rate(one, resolved, [slice(0, third, 2), slice(1, third, 2)])
    steady, before, seconds, rows = ray_rate(one)
    again = bare_rate(one, resolved, [slice(0, third, 2), slice(1, third, 2)])
    bare_pair = (pair + again) / 2
    table = pd.DataFrame(
        [
            {"how": "one process, two threads", "effects/s": round(single)},
            {"how": "two bare one-thread processes, before", "effects/s": round(pair)},
            {"how": "two bare one-thread processes, after", "effects/s": round(again)},
            {"how": "two one-thread replicas through Ray", "effects/s": round(steady)},
        ]
    )
    text = (
        f"`python -m benchmarks.through_ray --minutes {arguments.minutes:g}`\n\n"
        f"```\n{table.to_string(index=False)}\n```\n\n"
        f"Through Ray against one process with two threads: {steady / single:.2f} times.\n"
        f"Through Ray against bare processes: {steady / bare_pair:.1%} of their rate, "
        f"over {seconds:.0f} s and {rows:,} effects.\n"
        f"Before the first effect task: {before:.1f} s (model, corpus, Ray, replicas, calibration).\n"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
