"""A run beside the published figures (arXiv 2606.10703): one table of everything that both have measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from audit.config import ConfigError
from audit.published.compare import (
    agreement,
    side_by_side,
    side_by_side_control,
    side_by_side_gap_norm,
    side_by_side_progressive,
)
from audit.published.figures import check_model, model_facts
from audit.runfolder import RunFolder, RunFolderError
from jobs.console import print_table, read_table, rows_of, say

PUBLISHED_SCOPE = "sequence"

_PROGRESSIVE = ("document", "layer", "intervention", "target", "parameter", "scope", "delta_loss")


def compare_with(folder: RunFolder, model: str) -> pd.DataFrame:
    """Print every comparison that the run allows, and return them as one table, ``part`` naming the comparison.

    ``model``: the published name. Raises ConfigError where that was not published or the run's model is another one,
    RunFolderError where the run holds nothing to compare.
    """
    run = folder.require_run()
    require_same_model(run["model"], model)
    scope = str(run["specification"]["scope"])
    parts = {name: table for name, table in _parts(folder, model, scope).items() if len(table)}
    if not parts:
        raise RunFolderError(
            f"{folder.url}: nothing to compare; studies.importance, studies.progressive or effects of zero on single "
            "experts are needed, of a run that is finished"
        )
    for name, table in parts.items():
        print_table(f"{model}, {name}: published and ours", _shown(table), left=("metric",))
        say(f"{name}: {agreement(table)}")
        if "profile_rho" in table.attrs:
            say(f"Spearman's rank correlation of the two profiles over the layers: {table.attrs['profile_rho']:.2f}")
    if scope != PUBLISHED_SCOPE:
        say(f"not the same effect: the published ones are of scope {PUBLISHED_SCOPE}, the run's of scope {scope}")
    return pd.concat([table.assign(part=name) for name, table in parts.items()], ignore_index=True)


def require_same_model(found: Mapping[str, Any], model: str) -> None:
    """Raise ConfigError where ``model`` was not published, or has another structure than the run's."""
    try:
        check_model(model)
    except ValueError as error:
        raise ConfigError(f"--published{str(error).removeprefix('model')}") from error
    facts = {name: fact["value"] for name, fact in model_facts()[model].items()}
    experts = facts["num_experts"] if "num_experts" in facts else facts["n_routed_experts"]
    expected = {
        "family": facts["model_type"],
        "layers": facts["num_hidden_layers"],
        "experts": experts,
        "top_k": facts["num_experts_per_tok"],
    }
    for name, value in expected.items():
        if found[name] != value:
            raise ConfigError(
                f"--published: {model!r} has {name} {value}, the run's model {found['source']} has {found[name]}; name "
                "the model that was audited"
            )


def _parts(folder: RunFolder, model: str, scope: str) -> dict[str, pd.DataFrame]:
    parts: dict[str, pd.DataFrame] = {}
    specification = folder.require_run()["specification"]
    cells = read_table(folder, "cells")
    if cells is not None:
        parts["cells"] = side_by_side(cells, model, scope=scope)
        if specification["studies"]["importance"]["released_code"]:
            parts["cells of the released code"] = side_by_side(cells, model, scope=scope, label="published_code")
        parts["control"] = side_by_side_control(cells, model, scope=scope)
    if specification["studies"]["progressive"]:
        parts["progressive ablation"] = side_by_side_progressive(_highest(folder), model, scope=scope)
    experts = read_table(folder, "experts")
    if experts is not None:  # an expert's mean in place of its rows: the mean over experts is the same
        gap = side_by_side_gap_norm(experts.rename(columns={"mean_gap_norm": "gap_norm"}), model)
        if gap["gap_norm"].notna().any():
            parts["gap norm"] = gap
    return parts


def _highest(folder: RunFolder) -> pd.DataFrame:
    """The effects of removing a token's experts of the highest weight."""
    rows = folder.dataset("effects").to_table(
        columns=list(_PROGRESSIVE), filter=pc.field("target").cast(pa.string()) == "highest"
    )
    frame: pd.DataFrame = rows.to_pandas()
    return frame


def _shown(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The columns a person compares; intervals and the rest are in the file."""
    hidden = ("_low", "_high", "_p_t", "_p_wilcoxon", "p_t", "p_wilcoxon", "reason")
    columns = [name for name in table.columns if not name.endswith(hidden)]
    return [{name: _short(row[name]) for name in columns} for row in rows_of(table)]


def _short(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
