"""What the tables say: schemas, which cells are empty, and that every row names what was really done."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from families import ready, texts

from audit.effects import EFFECTS, TOKENS
from audit.engine import Engine, Measurement
from audit.interventions import Intervention, Target

ASKED = [
    Intervention("zero"),
    Intervention("scale", factor=0.25),
    Intervention("resample", draws=3),
    Intervention("zero", Target("all")),
    Intervention("zero", Target("lowest", count=1)),
    Intervention("mean", Target("listed", experts=(0, 2, 5))),
    Intervention("zero", Target("shared")),
]
SEQUENCES = texts((6, 1, 4), 21, first=3)
POSITIONS = [np.array([0, 2, 5]), np.array([0]), np.array([3])]


def measured(scope: str = "token", **options: object) -> Measurement:
    model = ready("deepseek_v2", 1)
    engine = Engine(model, memory=2**62, micro_batch=16, identity_every=2)
    calibration = engine.observe(texts((30, 25), 60), stored_outputs=5)
    return engine.measure(
        SEQUENCES,
        POSITIONS,
        layers=[1, 3],
        interventions=ASKED,
        scope=scope,
        calibration=calibration,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("method", ["sweep", "oracle"])
def test_schemas(scope: str, method: str) -> None:
    engine = Engine(ready("deepseek_v2", 1), memory=2**62, micro_batch=16, method=method)
    found = engine.measure(SEQUENCES[1:], POSITIONS[1:], layers=[2], interventions=[ASKED[0]], scope=scope)
    assert found.effects.schema.equals(EFFECTS)
    assert found.tokens.schema.equals(TOKENS)
    assert set(found.effects.to_pandas()["scope"]) == {scope}


def test_tokens_are_the_audited_ones_with_their_losses() -> None:
    tokens = measured().tokens.to_pandas()
    assert tokens[["document", "sequence", "position"]].values.tolist() == [
        [30, 3, 0],
        [30, 3, 2],
        [30, 3, 5],
        [40, 4, 0],
        [50, 5, 3],
    ]
    assert tokens["sentence"].tolist() == [0, 0, 1, 0, 0]
    assert set(tokens["domain"]) == {"text"}
    ids = {s.index: s.token_ids for s in SEQUENCES}
    for row in tokens.itertuples():
        here = ids[row.sequence]
        assert row.token_id == here[row.position]
        logits = reference.clean_run(ready("deepseek_v2", 1), torch.from_numpy(here)).logits_TV[row.position]
        log_p = torch.log_softmax(logits.double(), -1)
        assert row.baseline_entropy == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-5)
        if row.position + 1 == len(here):
            assert math.isnan(row.target_id)
            assert math.isnan(row.baseline_loss)
        else:
            assert row.target_id == here[row.position + 1]
            assert row.baseline_loss == pytest.approx(-float(log_p[here[row.position + 1]]), rel=1e-5)
    assert tokens["target_id"].isna().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_the_last_position_lacks_loss_and_logit_only(scope: str) -> None:
    effects = measured(scope).effects.to_pandas()
    last = [(s, t) in {(3, 5), (4, 0), (5, 3)} for s, t in zip(effects["sequence"], effects["position"], strict=True)]
    assert 0 < sum(last) < len(effects)
    for name in ("delta_loss", "delta_logit"):
        assert effects[name].isna().tolist() == last
    for name in ("kl", "js", "tv", "top1_flip", "gap_norm", "contribution_norm"):
        shared = effects["unit"] == "shared"
        identity = effects["unit"] == "identity"
        assert effects[~shared & ~identity][name].notna().all()
    assert effects[["kl", "js", "tv", "gap_norm"]].notna().all().all()
    assert (effects["document"] == 10 * effects["sequence"]).all()


def test_every_row_names_what_was_done() -> None:
    effects = measured().effects.to_pandas()
    model = ready("deepseek_v2", 1)
    clean = {s.index: reference.clean_run(model, torch.from_numpy(s.token_ids)) for s in SEQUENCES}
    assert set(effects["unit"]) == {"expert", "set", "shared", "identity"}
    for row in effects.itertuples():
        index = clean[row.sequence].index_TK[row.layer][row.position].tolist()
        weights = clean[row.sequence].weights_TK[row.layer][row.position]
        if row.unit == "expert":
            assert index[int(row.slot)] == row.expert
            assert row.routing_weight == pytest.approx(float(weights[int(row.slot)]), rel=1e-6)
            assert row.experts is None
        else:
            assert math.isnan(row.expert)
            assert math.isnan(row.slot)
        if row.unit == "set":
            slots = [index.index(e) for e in row.experts]
            assert slots == sorted(slots)
            assert slots
            assert row.routing_weight == pytest.approx(float(weights[slots].sum()), rel=1e-6)
            if row.intervention == "zero" and row.parameter == 1.0:
                assert slots == [int(weights.argmin())]
            elif row.intervention == "zero":
                assert list(row.experts) == index
                assert math.isnan(row.parameter)
            else:
                assert row.intervention == "mean"
                assert set(row.experts) == set(index) & {0, 2, 5}
        if row.unit in ("shared", "identity"):
            assert row.experts is None
            assert math.isnan(row.routing_weight)
        assert (row.intervention == "resample") == (not math.isnan(row.draw))
        if row.unit == "expert" and row.intervention == "scale":
            assert row.parameter == 0.25
            assert row.gap_norm == pytest.approx(0.75 * row.contribution_norm, rel=1e-5)
        if row.unit == "expert" and row.intervention == "zero":
            assert math.isnan(row.parameter)
            assert row.gap_norm == pytest.approx(row.contribution_norm, rel=1e-6)
    counted = effects.groupby(["layer", "unit", "intervention"], observed=True).size()
    for layer in (1, 3):
        assert counted[layer, "expert", "zero"] == counted[layer, "expert", "scale"] == 10  # 5 tokens, 2 slots
        assert counted[layer, "shared", "zero"] == 5
        assert counted[layer, "identity", "scale"] == 3  # every second of 5
        assert counted[layer, "set", "zero"] == 10
    draws = effects[effects["intervention"] == "resample"]
    assert sorted(set(draws["draw"])) == [0, 1, 2]
    assert draws.groupby("draw", observed=True).size().nunique() == 1


def test_what_a_sequence_row_says_where_the_expert_is_not_active() -> None:
    effects = measured("sequence", all_positions=True).effects.to_pandas()
    model = ready("deepseek_v2", 1)
    clean = {s.index: reference.clean_run(model, torch.from_numpy(s.token_ids)) for s in SEQUENCES}
    removed = effects[(effects["unit"] == "expert") & (effects["intervention"] == "zero")]
    active = [
        row.expert in clean[row.sequence].index_TK[row.layer][row.position].tolist() for row in removed.itertuples()
    ]
    assert not all(active)
    assert removed["slot"].notna().tolist() == active
    away = removed[~np.array(active)]
    assert (away["routing_weight"] == 0).all()
    assert (away["contribution_norm"] == 0).all()
    assert (away["gap_norm"] == 0).all()
    sets = effects[(effects["unit"] == "set") & (effects["intervention"] == "mean")]
    assert any(len(e) == 0 for e in sets["experts"])


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("method", ["sweep", "oracle"])
def test_a_request_that_acts_on_nothing_gives_controls_only(scope: str, method: str) -> None:
    """Including a sequence of which not even a control is measured."""
    model = ready("qwen3_moe", 0)
    sequences = texts((4, 2), 30)
    seen = {
        e
        for s in sequences
        for e in reference.clean_run(model, torch.from_numpy(s.token_ids)).index_TK[1].flatten().tolist()
    }
    idle = tuple(sorted(set(range(8)) - seen))
    engine = Engine(model, memory=2**62, micro_batch=16, identity_every=100, method=method)
    found = engine.measure(
        sequences,
        [np.arange(4), np.arange(2)],
        layers=[1],
        interventions=[Intervention("zero", Target("each", experts=idle))],
        scope=scope,
    )
    effects = found.effects.to_pandas()
    assert effects[["unit", "sequence", "position"]].values.tolist() == [["identity", 0, 0]]
    assert found.tokens.num_rows == 6


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("method", ["sweep", "oracle"])
def test_what_cannot_be_done_is_counted(scope: str, method: str) -> None:
    """Listed experts that are not active, sets that leave nobody to carry the weight, experts without calibration."""
    model, sequences = ready("qwen3_moe", 0), texts((7,), 31)
    index = reference.clean_run(model, torch.from_numpy(sequences[0].token_ids)).index_TK[2].tolist()
    engine = Engine(model, memory=2**62, micro_batch=16, method=method)
    calibration = engine.observe(texts((2,), 61), stored_outputs=2)
    unknown = set(calibration.missing(2))
    assert unknown
    assert set(range(8)) - unknown

    def run(*asked: Intervention) -> Measurement:
        options = {"scope": scope, "calibration": calibration}
        return engine.measure(sequences, [np.arange(7)], layers=[2], interventions=asked, **options)  # type: ignore[arg-type]

    listed = run(Intervention("renormalize", Target("listed", experts=(0, 1, 2, 3))))
    possible = [0 < len(set(row) & {0, 1, 2, 3}) < 2 for row in index]
    assert 0 < sum(possible) < 7
    assert listed.skipped == 7 - sum(possible)
    assert (listed.effects.to_pandas()["unit"] == "set").sum() == sum(possible)
    for kind in ("mean", "resample"):
        each = run(Intervention(kind))  # type: ignore[arg-type]
        used = {e for row in index for e in row}
        if scope == "token":
            assert each.skipped == sum(e in unknown for row in index for e in row)
        else:
            assert each.skipped == len(used & unknown)
        assert (each.effects.to_pandas()["unit"] == "expert").sum() == sum(
            e not in unknown for row in index for e in row
        )
        only = run(Intervention(kind, Target("each", experts=tuple(unknown))))  # type: ignore[arg-type]
        assert only.skipped == each.skipped > 0
        assert set(only.effects.to_pandas()["unit"]) == {"identity"}
