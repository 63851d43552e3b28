"""What commands say to people: tables on standard output, complaints on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd
from rich.console import Console
from rich.table import Table

from audit.models import ModelDescription
from audit.pruning import PrunedCheckpoint
from audit.runfolder import RunFolder
from audit.statistics.verdict import Word
from cluster.display import duration
from cluster.run import Job

MOST_EXPERTS = 10
_VERDICTS = get_args(Word)


def say(text: str) -> None:
    print(text)


def complain(text: str) -> None:
    print(f"moe-audit: {text}", file=sys.stderr)


def show_results(folder: RunFolder) -> None:
    """Mean KL and mean delta_loss per layer, the most and least important experts, the noise floor."""
    try:
        layers, experts, floor = (folder.read_table(name).to_pandas() for name in ("layers", "experts", "noise_floor"))
    except FileNotFoundError:
        return
    text = folder.read_result("findings.md")
    if text is not None:
        cells = folder.read_table("cells").to_pandas()
        confirmatory = folder.require_run()["specification"]["studies"]["importance"]["confirmatory"]
        show_cells(cells[cells["outcome"].isin(confirmatory)])
        say(text)
    keys = ["unit", "intervention", "target", "parameter", "scope"]
    layers = layers[layers["unit"] != "set"] if text is not None else layers  # those of the progressive study are many
    for cell, mine in layers.groupby(keys, dropna=False, sort=True):
        what = _cell(*cell)
        _print(f"Mean effect per layer: {what}", [{"layer": row["layer"], **_effects(row)} for row in _rows(mine)])
        same = (experts[keys].isna() & pd.isna(pd.Series(cell, keys))) | (experts[keys] == pd.Series(cell, keys))
        ranked = experts[same.all(axis=1)].sort_values(["mean_kl", "layer", "expert"], ascending=[False, True, True])
        if len(ranked):
            _print_experts(f"Most important experts by mean KL: {what}", ranked.head(MOST_EXPERTS))
            _print_experts(f"Least important experts by mean KL: {what}", ranked.tail(MOST_EXPERTS).iloc[::-1])
    noise = [
        {
            "layer": row["layer"],
            "outcome": row["outcome"],
            "rows": f"{row['rows']:,}",
            "99.9 % quantile": f"{row['quantile_999']:.2e}",
            "maximum": f"{row['maximum']:.2e}",
            "routed otherwise above": "" if pd.isna(row["routing_changed"]) else f"{row['routing_changed']:.2%}",
        }
        for row in _rows(floor[floor.outcome.isin(["kl", "delta_loss"])])
    ]
    caption = "* the median effect is below the layer's 99.9 % noise quantile"
    _print("Noise floor: |outcome| of interventions that change nothing", noise, caption)


def show_cells(cells: pd.DataFrame) -> None:
    """How many cells of every metric and outcome carry which verdict, and the largest |d|."""
    rows = []
    for (label, metric, outcome), mine in cells.groupby(["label", "metric", "outcome"], sort=True):
        known = mine["cohen_d"].dropna()
        counts = mine["verdict"].value_counts()
        rows.append(
            {
                "metric": metric,
                "label": label,
                "outcome": outcome,
                "cells": len(mine),
                "d": "" if known.empty else f"{known.min():+.2f} to {known.max():+.2f}",
                **{word: int(counts[word]) if word in counts else "" for word in _VERDICTS},
            }
        )
    _print("Verdicts by metric and outcome", rows)


def show_pruned(found: PrunedCheckpoint) -> None:
    """Where the smaller checkpoint lies and what it kept."""
    kept = len(next(iter(found.kept.values())))
    changes = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in found.config_changes.items())
    say(f"{found.folder}: {kept} experts in each of {len(found.kept)} layers ({changes})")
    say(f"{_size(found.bytes_before)} of weights became {_size(found.bytes_after)}")
    for note in found.notes:
        say(note)


def show_plan(job: Job) -> None:
    """Tasks, rows, predicted cost and size."""
    seconds, replicas = job.information["predicted"]["replica_seconds"], job.replicas
    _print(
        "Plan",
        [
            {
                "stage": p["stage"],
                "tasks": p["tasks"],
                "rows": f"{p['rows']:,}",
                "cost (GFLOP)": f"{p['flops'] / 1e9:,.1f}",
            }
            for p in job.information["plan"]
        ],
        caption=f"about {duration(seconds)} of one replica, {duration(seconds / replicas)} of {replicas}; "
        f"about {_size(job.information['predicted']['bytes'])} of effects on disk",
    )


def show_status(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """How far a run has come."""
    done = folder.done()
    rows = []
    for stage, tasks in ((p["stage"], p["tasks"]) for p in run["plan"]):
        committed = sum(id_.startswith(f"{stage}-") for id_ in done)
        share = f"{committed / tasks:.0%}" if tasks else ""
        rows.append({"stage": stage, "tasks": tasks, "committed": committed, "share": share})
    _print(folder.url, rows)


def show_model(found: ModelDescription) -> None:
    """What a checkpoint holds."""
    lines = {
        "source": found.source,
        "family": found.family,
        "parameters": f"{found.parameters:,}",
        "layers": found.layers,
        "MoE layers": f"{len(found.moe_layers)} ({', '.join(map(str, found.moe_layers))})",
        "experts": found.experts,
        "top-k": found.top_k,
        "router rule": found.router_rule,
        "shared experts": "yes" if found.shared_experts else "no",
        "hidden size": found.hidden_size,
        "vocabulary": found.vocabulary,
        "context limit": found.context_limit or "none",
        "engine": f"{found.engine} ({found.engine_reason})",
    }
    console = _console()
    for name, value in lines.items():
        console.print(f"{name:16}{value}", highlight=False, markup=False)
    for note in found.notes:
        console.print(f"{'':16}{note}", highlight=False, markup=False)


def _print_experts(title: str, experts: pd.DataFrame) -> None:
    _print(title, [{"layer": row["layer"], "expert": row["expert"], **_effects(row)} for row in _rows(experts)])


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _effects(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "effects": f"{row['n']:,}",
        "mean KL (nats)": _effect(row["mean_kl"], row["below_noise_kl"]),
        "mean delta_loss (nats)": _effect(row["mean_delta_loss"], row["below_noise_delta_loss"]),
        "top-1 flips": f"{row['mean_top1_flip']:.2%}",
    }


def _cell(unit: str, intervention: str, target: str, parameter: float, scope: str) -> str:
    named = "" if pd.isna(parameter) else f" {parameter:g}"
    selected = {"each": "every active expert by itself", "shared": "the shared experts"}.get(
        target, f"{target} experts"
    )
    return f"{intervention}{named}, {selected}, scope {scope}"


def _effect(value: float, below: bool | None) -> str:
    return f"{value:.3e}{'*' if below is not None and not pd.isna(below) and below else ''}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _print(title: str, rows: list[dict[str, Any]], caption: str | None = None) -> None:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if number == 0 and name == "stage" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)
