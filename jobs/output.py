"""What commands say of runs, plans, models and pruned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from audit.interventions import COUNTED
from audit.models import ModelDescription
from audit.pruning import PrunedCheckpoint
from audit.runfolder import RunFolder
from cluster.display import duration
from cluster.run import Job
from jobs.console import console, print_table, rows_of, say
from jobs.studies import show_studies

MOST_EXPERTS = 10


def show_results(folder: RunFolder) -> None:
    """The studies, mean effects per layer, the most and least important experts, the noise floor."""
    try:
        layers, experts, floor = (folder.read_table(name).to_pandas() for name in ("layers", "experts", "noise_floor"))
    except FileNotFoundError:
        return
    show_studies(folder)
    keys = ["unit", "intervention", "target", "parameter", "scope"]
    if folder.require_run()["specification"]["studies"]["progressive"]:
        removals = (layers["unit"] == "set") & layers["target"].str.startswith(COUNTED, na=False)
        say(f"mean effects of {int(removals.sum()):,} sets of experts in {folder.path('results', 'layers.parquet')}")
        layers = layers[~removals]
    for cell, mine in layers.groupby(keys, dropna=False, sort=True):
        what = _cell(*cell)
        means = [{"layer": row["layer"], **_effects(row)} for row in rows_of(mine)]
        print_table(f"Mean effect per layer: {what}", means)
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
            "largest |repeat - effect|": "" if pd.isna(row["repeat_maximum"]) else f"{row['repeat_maximum']:.2e}",
        }
        for row in rows_of(floor[floor.outcome.isin(["kl", "delta_loss"])])
    ]
    caption = (
        "* the median effect is below the layer's 99.9 % noise quantile. A repeat is an effect computed again under "
        "another rounding: what rounding alone does to an effect"
    )
    print_table("Noise floor: |outcome| of interventions that change nothing", noise, caption)


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
    seconds, groups = job.information["predicted"]["group_seconds"], job.scale.max_groups
    print_table(
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
        caption=f"about {duration(seconds)} of one group, {duration(seconds / groups)} of {groups}; "
        f"about {_size(job.information['predicted']['bytes'])} of effects on disk",
        left=("stage",),
    )
    say(f"back end {job.information['backend']}")


def show_status(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """How far a run has come."""
    done = folder.done()
    rows = []
    for stage, tasks in ((p["stage"], p["tasks"]) for p in run["plan"]):
        committed = sum(id_.startswith(f"{stage}-") for id_ in done)
        share = f"{committed / tasks:.0%}" if tasks else ""
        rows.append({"stage": stage, "tasks": tasks, "committed": committed, "share": share})
    print_table(folder.url, rows, left=("stage",))


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
    out = console()
    for name, value in lines.items():
        out.print(f"{name:16}{value}", highlight=False, markup=False)
    for note in found.notes:
        out.print(f"{'':16}{note}", highlight=False, markup=False)


def _print_experts(title: str, experts: pd.DataFrame) -> None:
    print_table(title, [{"layer": row["layer"], "expert": row["expert"], **_effects(row)} for row in rows_of(experts)])


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
