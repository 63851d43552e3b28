"""How far the cluster's parts carry: groups, driver, ledger, committer and reducer, each against its goal.

    python -m benchmarks.scaling --markdown benchmarks/2026-01-01_scaling.md
    python -m benchmarks.scaling --part driver --part ledger

groups     effects per second of two one-thread groups through Ray against one, and against two bare one-thread
           processes before and after, as benchmarks/through_ray.py measures them
driver     tasks per second of the driver alone, with groups that answer at once, 8 and 1,000 of them
ledger     memory of a stage of a million tasks and its ledger
committer  rows per second from the object store to Parquet, committed
reducer    seconds and peak memory of the summaries of 100 million generated effects, then of the importance audit of
           fewer; needs 4 GB of disk, and 8 minutes to generate them
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import psutil
import pyarrow as pa
import ray
import transformers

from audit.runfolder import RunFolder
from benchmarks import through_ray
from benchmarks.generated import LAYERS, task_tables, write_run
from benchmarks.memory import MIB, isolated, peak_memory
from benchmarks.stub_groups import NoWork, SeenTasks, StubFleet, make_tasks
from cluster.display import NoDisplay
from cluster.driver.driver import Driver, Policy
from cluster.driver.group import Result, Shape
from cluster.driver.ledger import Ledger
from cluster.driver.scaling import Scale
from cluster.groups.ray_fleet import RayFleet
from cluster.planning.plan import prepare
from cluster.results import reducer
from cluster.results.committer import FolderCommitter
from cluster.run import Job
from cluster.session import cores, ray_session

IMPORTANCE = {"metrics": ["reap"], "random_rankings": 9, "bootstrap_draws": 100}  # the least: what counts is memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Sizes of what is measured."""

    minutes: float
    tasks: int
    rows: int
    importance_rows: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table; ``goal`` is empty where there is none."""

    what: str
    measured: str
    goal: str = ""


# Groups ---------------------------------------------------------------------------------------------------------------


def groups(arguments: Arguments) -> Iterable[Line]:
    transformers.logging.set_verbosity_error()
    checkpoint = arguments.folder / "model"
    through_ray.write_checkpoint(checkpoint)
    documents = max(4, round(arguments.minutes * through_ray.EFFECTS_PER_MINUTE / (3 * 180 * 16 * 8)))
    config = through_ray.specification(checkpoint, documents, 1)
    job = prepare(config)
    resolved = dict(job.identity["resolved"])
    tasks = through_ray.measuring(job)
    per_effect = sum(task.flops for task in tasks) / sum(task.rows for task in tasks)
    shares = [slice(0, None, 16), slice(8, None, 16)]
    before = through_ray.bare_rate(config, resolved, shares)
    two = through_ray.ray_rate(job).rate
    one = through_ray.ray_rate(replace(_half(job), scale=replace(job.scale, max_groups=1))).rate
    after = through_ray.bare_rate(config, resolved, shares)
    bare = (before + after) / 2
    yield Line("two bare one-thread processes, before and after", f"{_rates(before, after, per=per_effect)} effects/s")
    yield Line("two one-thread groups", f"{_rates(two, per=per_effect)} effects/s")
    yield Line("one one-thread group", f"{_rates(one, per=per_effect)} effects/s")
    yield Line("two groups against one", f"{two / one:.2f} times", "1.85 times")
    yield Line("two groups against two bare processes", f"{two / bare:.1%}", "95 %")


def _half(job: Job) -> Job:
    """Every second task that measures, spread over the whole: one group alone is to take as long as two."""
    kept = {task.id for task in through_ray.measuring(job)[::2]}
    stages = [(name, [t for t in tasks if t.kind != "measure" or t.id in kept]) for name, tasks in job.stages]
    return replace(job, stages=stages)


def _rates(*rates: float, per: float) -> str:
    return " and ".join(f"{rate / per:,.0f}" for rate in rates)


# Driver and ledger ----------------------------------------------------------------------------------------------------


def driver(arguments: Arguments) -> Iterable[Line]:
    for count in (8, 1000):
        rate, peak = isolated(drive, arguments.tasks, count)
        goal = "1,500 tasks/s" if count == 8 else ""
        what = f"driver alone, {count:,} stub groups, {arguments.tasks:,} tasks"
        yield Line(what, f"{rate:,.0f} tasks/s, {peak / MIB:,.0f} MiB", goal)
    rate = isolated(drive_ray, 10_000, 8)
    yield Line("driver with 8 Ray groups whose tasks do nothing", f"{rate:,.0f} tasks/s")


def drive(tasks: int, count: int) -> tuple[float, int]:
    """Tasks per second through ``count`` stub groups, and the peak memory of the process."""
    folder = tempfile.mkdtemp(prefix="scaling-driver-")
    made, committer = make_tasks(tasks), SeenTasks()
    run = Driver(
        StubFleet(count), committer, RunFolder(folder), Policy(), Scale(min_groups=1, max_groups=count), NoDisplay()
    )
    with peak_memory() as peak:
        start = time.perf_counter()
        ledger = run.run("effects", made, {})
        seconds = time.perf_counter() - start
    run.close()
    shutil.rmtree(folder)
    assert ledger.committed == len(committer.seen) == tasks
    return tasks / seconds, peak.driver


def drive_ray(tasks: int, count: int) -> float:
    """Tasks per second through ``count`` groups on Ray whose worker has nothing to do."""
    folder = tempfile.mkdtemp(prefix="scaling-driver-")
    with ray_session(count):
        fleet = RayFleet(NoWork, Shape(), name="scaling", patience=600.0)
        scale = Scale(min_groups=1, max_groups=count)
        run = Driver(fleet, SeenTasks(), RunFolder(folder), Policy(), scale, NoDisplay())
        run.run("warm up", make_tasks(10 * count), {})
        made = [replace(task, id=f"{task.id}-again") for task in make_tasks(tasks)]
        start = time.perf_counter()
        run.run("effects", made, {})
        seconds = time.perf_counter() - start
        run.close()
    shutil.rmtree(folder)
    return tasks / seconds


def ledger(arguments: Arguments) -> Iterable[Line]:
    tasks, both = isolated(hold, 1_000_000)
    yield Line("a million tasks", f"{tasks / MIB:,.0f} MiB")
    yield Line("a million tasks and their ledger", f"{both / MIB:,.0f} MiB", "2,048 MiB")


def hold(tasks: int) -> tuple[int, int]:
    """Resident bytes that a stage of so many tasks adds, and with its ledger, every task having been handed out."""
    process = psutil.Process()
    before = process.memory_info().rss
    made = make_tasks(tasks)
    held = process.memory_info().rss - before
    book = Ledger(made, {}, 3)
    while (taken := book.take()) is not None:
        book.answer(taken[0].id)
    return held, process.memory_info().rss - before


# Committer ------------------------------------------------------------------------------------------------------------


def committer(arguments: Arguments) -> Iterable[Line]:
    rate, size = isolated(commit, str(arguments.folder / "committed"), 12)
    yield Line("committer, 64 tasks a commit", f"{rate:,.0f} rows/s, {size:.0f} bytes/row", "1,000,000 rows/s")


def commit(url: str, commits: int) -> tuple[float, float]:
    """Rows per second that are committed from the object store, and bytes per row on disk; the first warms up."""
    folder = RunFolder(url)
    with ray_session(cores()):
        tables = [pa.concat_tables(task_tables(sequence)) for sequence in range(64)]
        refs = [ray.put(table) for table in tables]
        rows = sum(map(len, tables))
        keeper, start = FolderCommitter(folder, "scaling"), 0.0
        for number in range(commits + 1):
            if number == 1:
                start = time.perf_counter()
            keeper.commit(
                [
                    Result(f"effects-{number}-{i}", {"rows": {"effects": len(table)}}, {"effects": ref})
                    for i, (table, ref) in enumerate(zip(tables, refs, strict=True))
                ]
            )
        seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(url).glob("effects/**/*.parquet"))
    return rows * commits / seconds, size / (rows * (commits + 1))


# Reducer --------------------------------------------------------------------------------------------------------------


def reducing(arguments: Arguments) -> Iterable[Line]:
    for studies, rows in (({}, arguments.rows), ({"importance": IMPORTANCE}, arguments.importance_rows)):
        run = arguments.folder / f"run-{rows}"
        written = write_run(run, rows, studies)
        seconds, peak = isolated(reduce, str(run))
        shutil.rmtree(run)
        what = "summaries and importance audit" if studies else "summaries"
        yield Line(f"{what} of {written:,} effects, {LAYERS} layers", f"{seconds:,.0f} s, {peak}", "bounded memory")


def reduce(url: str) -> tuple[float, str]:
    """Seconds that the results of a run folder take, and the peak of memory."""
    with ray_session(cores()), peak_memory() as peak:
        start = time.perf_counter()
        reducer.reduce(RunFolder(url))
        return time.perf_counter() - start, str(peak)


PARTS: dict[str, Callable[[Arguments], Iterable[Line]]] = {
    "groups": groups,
    "driver": driver,
    "ledger": ledger,
    "committer": committer,
    "reducer": reducing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given several times; default: all")
    parser.add_argument("--minutes", type=float, default=2.0, help="about how long two groups work")
    parser.add_argument("--tasks", type=int, default=100_000, help="that the driver hands out")
    parser.add_argument("--rows", type=float, default=1e8, help="effects whose summaries are made")
    parser.add_argument("--importance-rows", type=float, default=4e6, help="effects of the importance audit")
    parser.add_argument("--folder", type=Path, help="for what is written; default: one that is deleted")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="scaling-"))
    arguments = Arguments(
        minutes=given.minutes,
        tasks=given.tasks,
        rows=int(given.rows),
        importance_rows=int(given.importance_rows),
        folder=folder,
    )
    parts = given.part or list(PARTS)
    lines: list[Line] = []
    try:
        for part in parts:
            for line in PARTS[part](arguments):
                lines.append(line)
                print(f"{line.what}: {line.measured}", flush=True)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    text = (
        f"# Scaling, {date.today()}: {cores()} cores, {psutil.virtual_memory().total / (1 << 30):.0f} GiB, "
        f"ray {ray.__version__}, pyarrow {pa.__version__}, Python {platform.python_version()}\n\n"
        f"`python -m benchmarks.scaling {' '.join(f'--part {part}' for part in parts)}`\n\n"
        f"{_markdown(lines)}\n"
    )
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


def _markdown(lines: Iterable[Line]) -> str:
    rows = [("what", "measured", "goal"), ("---",) * 3, *((line.what, line.measured, line.goal) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
