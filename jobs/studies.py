"""What commands say of a run's studies: verdicts, negative controls, redundancy, cliffs, redistribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd

from audit.runfolder import RunFolder
from audit.statistics.cells import CONTROLS
from audit.statistics.verdict import Word
from jobs.console import print_table, read_table, rows_of, say

# The table without which a study was not made.
_TABLES = {
    "importance": "cells",
    "progressive": "progressive",
    "redistribution": "redistribution",
    "redundancy": "redundancy_verdicts",
}
_VERDICTS = get_args(Word)


def show_studies(folder: RunFolder) -> None:
    """A short table or a sentence for every study that the run's specification asks for, and where the rest is."""
    asked = {name: section for name, section in folder.require_run()["specification"]["studies"].items() if section}
    for name, section in asked.items():
        table = read_table(folder, _TABLES[name])
        if table is None:
            say(f"studies.{name}: not made, because none of the tasks it needs is done")
        elif name == "importance":
            _show_importance(folder, table, section)
        elif name == "progressive":
            show_cliffs(table, section["cliff"])
            say(f"every mean, interval and area in {folder.path('results')}: progressive.parquet, areas.parquet")
        elif name == "redistribution":
            _show_redistribution(folder, table)
        else:
            show_redundancy(table)
            say(f"perplexity and KL of every criterion in {folder.path('results', 'redundancy.parquet')}")


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
                "verdicts": ", ".join(f"{counts[word]} {word}" for word in _VERDICTS if word in counts),
            }
        )
    rows.sort(key=lambda row: row["label"] in CONTROLS)  # last, whatever the other labels are
    print_table("Verdicts by metric and outcome", rows, left=("metric", "label", "outcome", "verdicts"))


def show_controls(controls: pd.DataFrame) -> None:
    """How often rankings that know nothing look significant to a t test, over the layers."""
    rows = []
    for (metric, outcome), mine in controls.groupby(["metric", "outcome"], sort=True):
        rate = mine["rejection_rate"].dropna()
        rows.append(
            {
                "control": metric,
                "outcome": outcome,
                "cells": len(mine),
                "rankings each": _range(mine["rankings"], ",d"),
                "p_t < 0.05 in": "not estimable" if rate.empty else _range(rate, ".1%"),
            }
        )
    caption = "random_token should stay near 5 %; the excess of random_ranking is what p_permutation guards against"
    print_table("Negative controls", rows, caption, left=("control", "outcome"))


def show_redundancy(verdicts: pd.DataFrame) -> None:
    """Verdict and 90 % interval of the metrics' spread, a row per place, a column per share."""
    rows = []
    for where, mine in verdicts.groupby("where", sort=False):
        row = {"where": where}
        for cell in rows_of(mine):
            interval = "" if pd.isna(cell["low"]) else f" {cell['low']:.2f} to {cell['high']:.2f}"
            row[f"{cell['share']:.1%} removed"] = f"{cell['verdict']}{interval}"
        rows.append(row)
    margin, draws = verdicts["margin"].iloc[0], verdicts["draws"].min()
    told = f"{draws} random draws" + (", too few for a test: descriptive" if verdicts["descriptive"].any() else "")
    caption = f"(KL of the worst metric - KL of the best) / mean KL of random draws; margin {margin:g}, {told}"
    print_table("Are pruning criteria interchangeable?", rows, caption, left=tuple(rows[0]))


def show_cliffs(points: pd.DataFrame, cliff: float) -> None:
    """How many experts every order has to remove until the mean loss rises by more than the cliff, by layer."""
    rows = []
    for order, mine in points.groupby("order", sort=False):
        first = mine.groupby("layer")["cliff"].first()
        found = "; ".join(f"layer {layer}: {count}" for layer, count in first.dropna().items())
        none = f"none in {first.isna().sum()} of {len(first)} layers" if first.isna().any() else ""
        largest = mine["mean"].max()
        rows.append(
            {
                "order": order,
                "cliff": "; ".join(filter(None, [found, none])),
                "largest mean": "" if pd.isna(largest) else f"{largest:+.3g}",
            }
        )
    print_table(f"Experts removed until the mean delta_loss exceeds {cliff:g} nat", rows, left=("order", "cliff"))


def _show_importance(folder: RunFolder, cells: pd.DataFrame, section: Mapping[str, Any]) -> None:
    confirmatory = section["confirmatory"]
    show_cells(cells[cells["outcome"].isin(confirmatory)])
    others = int((~cells["outcome"].isin(confirmatory)).sum())
    if others:
        say(f"{others:,} cells of outcomes that are not confirmatory in {folder.path('results', 'cells.csv')}")
    controls = folder.read_table("controls").to_pandas()
    show_controls(controls[controls["outcome"].isin(confirmatory)])
    say(str(folder.read_result("findings.md")).strip())


def _show_redistribution(folder: RunFolder, table: pd.DataFrame) -> None:
    missing = table.groupby("quantity")["mean"].transform(lambda mean: mean.isna().all())
    known = table[~missing]
    print_table(
        "Redistribution: means over tokens and experts",
        [
            {"layer": layer} | {row["quantity"]: _mean(row) for row in rows_of(mine)}
            for layer, mine in known.groupby("layer", sort=True)
        ],
    )
    for quantity, mine in table[missing].groupby("quantity", sort=False):
        say(f"{quantity}: {'; '.join(mine['reason'].unique())}")
    for row in rows_of(folder.read_table("gap_depth").to_pandas()):
        found = row["reason"] or f"rho = {row['rho']:+.2f}, p = {row['p']:.2g}, {row['n']} layers"
        say(f"{row['statistic']} gap norm against depth: {found}")
    say(f"intervals, medians and weight_and_gap.parquet in {folder.path('results')}")


def _mean(row: Mapping[str, Any]) -> str:
    return str(row["reason"]) if pd.isna(row["mean"]) else f"{row['mean']:.3g}"


def _range(values: pd.Series[Any], form: str) -> str:
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"
