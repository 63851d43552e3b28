"""What remains beside what went, against plain forwards with routing weights of zero and hooks on the MoE block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import WITH_SHARED, Float64Throughout, build, ready, texts
from scipy.spatial.distance import cosine
from torch import Tensor

from audit.engine import Engine
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare

COLUMNS = ["remainder_norm", "gap_cosine", "remainder_norm_shared", "gap_cosine_shared"]
KEY = ["sequence", "position", "layer", "unit", "target", "expert", "intervention"]
ASKED = [
    Intervention("zero"),
    Intervention("zero", Target("highest", count=2)),
    Intervention("zero", Target("all")),
    Intervention("renormalize"),
]


def outputs(model: MoEModel, ids: Tensor, layer: int, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The routed experts' output and that of the whole MoE block with its shared experts, [T, D] each, in one plain
    forward with the routing weights ``table``.
    """
    site = model.sites[layer]
    routed: list[Tensor] = []
    whole: list[Tensor] = []

    def edit(module: Any, args: Any) -> Any:
        return (args[0], args[1], args[2] if table is None else table)

    def note(into: list[Tensor]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            into.append(first.reshape(len(ids), -1).clone())

        return hook

    handles = [
        site.experts.register_forward_pre_hook(edit),
        site.experts.register_forward_hook(note(routed)),
        site.block.register_forward_hook(note(whole)),
    ]
    if site.shared is not None and not any(child is site.shared for child in site.block.modules()):
        handles.append(site.shared.register_forward_hook(note(whole)))
    try:
        with torch.inference_mode(), model.own_attention():
            model.module(input_ids=ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return routed[0], torch.stack(whole).sum(0)


def expected(model: MoEModel, ids: Tensor, layer: int, t: int, experts: list[int]) -> dict[str, float]:
    """The four columns for the removal of ``experts`` at position ``t``."""
    clean = reference.clean_run(model, ids)
    table = clean.weights_TK[layer].clone()
    table[t, torch.isin(clean.index_TK[layer][t], torch.tensor(experts))] = 0.0
    found = {}
    for suffix, before, after in zip(
        ("", "_shared"), outputs(model, ids, layer), outputs(model, ids, layer, table), strict=True
    ):
        gap, remainder = (before - after)[t].numpy(), after[t].numpy()
        found[f"remainder_norm{suffix}"] = np.linalg.norm(remainder)
        nothing = not remainder.any()
        found[f"gap_cosine{suffix}"] = np.nan if nothing else 1.0 - cosine(gap, remainder)
    if model.sites[layer].shared is None:
        found["remainder_norm_shared"] = found["gap_cosine_shared"] = np.nan
    return found


def measured(engine: Engine, scope: str, layers: list[int], **options: Any) -> pd.DataFrame:
    sequences = texts((9, 5), 4, engine.model.description.vocabulary)
    positions = [np.array([0, 3, 8]), np.array([2])]
    effects = engine.measure(
        sequences, positions, layers=layers, interventions=ASKED, scope=scope, redistribution=True, **options
    ).effects.to_pandas()
    effects["ids"] = [torch.from_numpy(sequences[s].token_ids) for s in effects["sequence"]]
    return effects


def compare(model: MoEModel, effects: pd.DataFrame, tolerance: float) -> int:
    """Check every row against plain forwards; how many have a cosine."""
    asked = (effects["intervention"] == "zero") & (effects["unit"].isin(["expert", "set"]))
    assert effects.loc[~asked, COLUMNS].isna().all(axis=None)
    assert (~asked).any()
    for _, row in effects[asked].iterrows():
        experts = [int(row["expert"])] if row["unit"] == "expert" else row["experts"].tolist()
        exact = expected(model, row["ids"], row["layer"], row["position"], experts)
        for name in COLUMNS:
            assert row[name] == pytest.approx(exact[name], rel=tolerance, abs=tolerance, nan_ok=True), (name, row)
    return int(effects.loc[asked, "gap_cosine"].notna().sum())


@pytest.mark.parametrize("family", ["olmoe", *sorted(WITH_SHARED)])
def test_plain_forwards_give_the_same(family: str) -> None:
    with Float64Throughout():
        model = prepare(build(family, 1, top_k=2 if family != "qwen2_moe" else 3))
        engine = Engine(model, memory=2**62, micro_batch=7)
        effects = measured(engine, "token", [list(model.sites)[1]])
        assert compare(model, effects, 1e-6) >= 8
    removed = effects[effects["target"] == "all"]
    assert (removed["remainder_norm"] == 0.0).all()  # nobody is left
    assert removed["gap_cosine"].isna().all()
    if family in WITH_SHARED:
        assert (removed["remainder_norm_shared"] > 0.0).all()


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoeshared", "mixtral"])
def test_it_is_the_same_by_the_oracle_and_in_sequence_scope(family: str) -> None:
    model = ready(family, 2)
    layers = [1, 2]
    sweep = measured(Engine(model, memory=2**62), "token", layers)
    others = [
        measured(Engine(model, memory=2**62, method="oracle"), "token", layers),
        measured(Engine(model, memory=2**62), "sequence", layers),
        measured(Engine(model, memory=2**62, method="oracle"), "sequence", layers),
    ]
    for other in others:
        both = sweep[[*KEY, *COLUMNS]].merge(other[[*KEY, *COLUMNS]], on=KEY, suffixes=("", "_other"))
        both = both[both["gap_cosine"].notna()]
        assert len(both) >= 16
        np.testing.assert_allclose(
            both[COLUMNS].to_numpy(float), both[[f"{c}_other" for c in COLUMNS]].to_numpy(float), rtol=1e-5, atol=1e-6
        )


def test_at_positions_where_nothing_is_removed_everything_remains() -> None:
    model = ready("olmoe", 2)
    effects = measured(Engine(model, memory=2**62), "sequence", [1], all_positions=True)
    untouched = effects[
        (effects["intervention"] == "zero") & (effects["unit"] == "expert") & (effects["gap_norm"] == 0)
    ]
    assert len(untouched) > 10
    assert untouched["gap_cosine"].isna().all()
    for _, row in untouched.iterrows():
        y_TD, _ = outputs(model, row["ids"], 1)
        assert row["remainder_norm"] == pytest.approx(float(y_TD[row["position"]].norm()), rel=1e-5)


def test_it_is_null_unless_asked() -> None:
    engine = Engine(ready("qwen2_moe", 1), memory=2**62)
    effects = engine.measure(texts((5,), 1), [np.array([2])], layers=[1], interventions=ASKED).effects
    for name in COLUMNS:
        assert effects[name].null_count == len(effects)
