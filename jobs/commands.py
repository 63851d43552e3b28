"""What the commands do; each returns its exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from audit.config import AuditConfig, ConfigError
from audit.models import ModelError, describe
from audit.observations.registry import find_metric
from audit.pruning import prune_by_metric
from audit.runfolder import RunFolder, RunFolderError
from audit.statistics.cells import Settings
from audit.storage import StorageError
from audit.studies.contrasts import ContrastError, cells_of, read_contrasts, write_cells
from audit.studies.findings import findings
from cluster.display import duration, make_display
from cluster.driver.driver import RunError
from cluster.files.cluster_files import check_cluster_file
from cluster.groups.checkpoint_cache import local_folder
from cluster.planning.plan import prepare
from cluster.planning.remote_plan import prepare_for_run
from cluster.run import Job, execute, identity_of, reduce_again, refuse_other
from cluster.session import StopSignal, ending_signals
from cluster.submission.job_client import JobError
from jobs import output, submit
from jobs.compare import compare_with
from jobs.console import complain, say
from jobs.plan_model import plan_model
from jobs.studies import show_cells


def call(command: str, given: argparse.Namespace) -> int:
    """Run a command. A mistake of the caller is one sentence on standard error and status 2."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": run,
        "plan": plan,
        "submit": submit.submit,
        "follow": submit.follow,
        "stop": submit.stop,
        "status": status,
        "reduce": reduce,
        "cells": cells,
        "prune": prune,
        "compare": compare,
        "validate": validate,
        "models": models,
        "cluster-check": cluster_check,
    }
    try:
        with ending_signals():
            return commands[command](given)
    except (ConfigError, ContrastError, JobError, ModelError, RunFolderError, StorageError) as error:
        complain(_sentence(error))
        return 2
    except RunError as error:
        complain(f"{_sentence(error)}; what is committed stays")
        return 1
    except StopSignal as signal:
        if command in ("run", "reduce"):
            complain("stopped; what is committed stays, and the same command goes on from there")
        return signal.status


def run(given: argparse.Namespace) -> int:
    config = AuditConfig.load(given.config, given.set)
    folder = RunFolder(given.out)
    folder.require_usable()
    refuse_other(folder, {"specification": identity_of(config.resolved())})  # before the model is loaded for nothing
    resolved = folder.require_run()["identity"]["resolved"] if folder.holds_run() else None
    display = make_display(given.display)
    try:
        job = prepare_for_run(config, resolved, display.say)
        outcome = execute(job, folder, display)
    finally:
        display.close()
    if outcome.signal:
        committed = f"{len(folder.done())} of {_tasks(job)} tasks committed"
        complain(f"stopped with {committed}; the same command goes on from there")
        return outcome.exit_status
    output.show_results(folder)
    for note in [*_about(folder), *_notes(folder)]:
        say(note)
    say(f"result tables in {folder.path('results')}, every effect in {folder.path('effects')}")
    if outcome.quarantined or outcome.blocked:
        lost = f"{len(outcome.quarantined)} tasks are quarantined: {', '.join(sorted(outcome.quarantined))}"
        also = f", and {len(outcome.blocked)} that need them were not run" if outcome.blocked else ""
        complain(f"{lost}{also}; {folder.path('quarantine.jsonl')} has their errors")
    return outcome.exit_status


def plan(given: argparse.Namespace) -> int:
    if (given.config is None) == (given.model is None):
        both = "both" if given.model else "neither"
        raise ConfigError(
            f"plan: {both} of CONFIG and --model given; give an audit's file, or --model and a model's name"
        )
    if given.model is not None:
        if given.set:
            raise ConfigError(
                f"--set: {given.set[0]!r} changes an audit's file, which --model has none of; leave it out"
            )
        return plan_model(given)
    for option in ("ranks", "device_memory", "host_memory", "disk"):
        if getattr(given, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')}: {getattr(given, option)!r} goes with --model; for an audit's file use "
                "--set cluster.ranks, engine.memory or model.offload_folder"
            )
    output.show_plan(prepare(AuditConfig.load(given.config, given.set)))
    return 0


def status(given: argparse.Namespace) -> int:
    if given.address is not None:
        return submit.status_of_job(given.dir, given.address)
    folder = RunFolder(given.dir)
    output.show_status(folder, folder.require_run())
    for note in _notes(folder):
        say(note)
    return 0


def reduce(given: argparse.Namespace) -> int:
    folder = RunFolder(given.dir)
    display = make_display("auto")
    try:
        names = reduce_again(folder, display)
    finally:
        display.close()
    output.show_results(folder)
    say(f"{', '.join(names)} in {folder.path('results')}")
    return 0


def cells(given: argparse.Namespace) -> int:
    try:
        settings = Settings(
            alpha=given.alpha,
            margin=given.margin,
            bootstrap_draws=given.draws,
            seed=given.seed,
            confirmatory=tuple(given.confirmatory),
        )
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('bootstrap_draws', 'draws')}") from error
    table = cells_of(read_contrasts(given.contrasts), settings)
    paths = write_cells(table, given.out)
    show_cells(table)
    say(findings(table, settings))
    say(f"{len(table):,} cells in {' and '.join(map(str, paths))}")
    return 0


def prune(given: argparse.Namespace) -> int:
    folder = RunFolder(given.dir)
    run = folder.require_run()
    try:
        table = folder.read_table("metrics").to_pandas()
        found = prune_by_metric(
            run["model"]["source"],
            table[table["domain"].isna()],
            find_metric(given.metric).name,
            keep=given.keep,
            out=Path(given.out),
            files=local_folder(run["model"]["source"]),
            revision=AuditConfig.parse(run["specification"], Path()).model.revision,
        )
    except FileNotFoundError as error:
        raise RunFolderError(str(error)) from error
    except ModelError:
        raise
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    output.show_pruned(found)
    return 0


def compare(given: argparse.Namespace) -> int:
    folder = RunFolder(given.dir)
    table = compare_with(folder, given.published)
    folder.write_result("side_by_side.csv", table.to_csv(index=False, lineterminator="\n"))
    say(f"{len(table)} rows, with intervals and reasons, in {folder.url}/results/side_by_side.csv")
    return 0


def validate(given: argparse.Namespace) -> int:
    config = AuditConfig.load(given.config, given.set)
    job = prepare(config)
    model, method = job.information["model"], job.identity["resolved"]["method"]
    say(f"{given.config} is valid")
    say(f"  model   {model['source']}: {model['family']}, engine {method} ({model['engine_reason']})")
    say(f"  corpus  {job.information['corpus']['summary']}")
    say(f"  work    {_tasks(job)} tasks; see moe-audit plan")
    return 0


def models(given: argparse.Namespace) -> int:
    config = AuditConfig.load(given.config, given.set)
    where = config.model
    source = where.location(config.folder)
    found = describe(
        source,
        files=local_folder(source, allow_pickle=where.allow_pickle),
        revision=where.revision,
        trust_remote_code=where.trust_remote_code,
    )
    output.show_model(found)
    return 0


def cluster_check(given: argparse.Namespace) -> int:
    mistaken = False
    for file in given.files:
        found = check_cluster_file(Path(file))
        mistaken |= bool(found.mistakes)
        for mistake in found.mistakes:
            complain(f"{file}: {mistake}")
        if not found.mistakes:
            say(f"{file} is in order: {found.what}")
        for remark in found.remarks:
            say(f"  note: {remark}")
    return 2 if mistaken else 0


def _tasks(job: Job) -> int:
    return sum(len(tasks) for _, tasks in job.stages)


def _about(folder: RunFolder) -> list[str]:
    """The text that was audited, what of it was left out, and the method where it is not the usual one."""
    run = folder.require_run()
    model = run.get("model", {})
    method = run["identity"].get("resolved", {}).get("method")
    about = [f"corpus: {run['corpus']['summary']}"] if "corpus" in run else []
    trusted = run.get("specification", {}).get("model", {})
    if trusted.get("trust_remote_code"):
        about.append("code that came with the checkpoint was run (model.trust_remote_code)")
    if trusted.get("allow_pickle"):
        about.append("pickled weights were allowed (model.allow_pickle)")
    if method == "oracle":
        about.append(f"one whole forward per effect (oracle): {model.get('engine_reason', 'asked for')}")
    return about


def _notes(folder: RunFolder) -> list[str]:
    """What was skipped, capped or left undone, from the manifests and the quarantine."""
    done = folder.done()
    receipts: list[Any] = list(done.values())
    skipped = sum(receipt.get("skipped", 0) for receipt in receipts)
    halved = sum(receipt.get("halvings", 0) > 0 for receipt in receipts)
    given_up = sorted({line["task"] for line in folder.lines("quarantine.jsonl")} - set(done))
    notes = []
    if skipped:
        notes.append(f"{skipped:,} effects were skipped: nothing to act upon, or an expert without calibration")
    if halved:
        notes.append(
            f"{halved} tasks ran out of memory and went on with smaller micro-batches: equal within the noise floor"
        )
    if given_up:
        notes.append(f"quarantined: {', '.join(given_up)}")
    seconds = sum(receipt.get("seconds", 0.0) for receipt in receipts)
    rows = sum(receipt["rows"].get("effects", 0) for receipt in receipts)
    notes.append(f"{rows:,} effects in {len(done)} tasks, {duration(seconds)} of group time")
    return notes


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
