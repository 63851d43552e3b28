"""What must hold of effects whatever the model: no effect, all of it, and independence of how the work is cut up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import SWEEP, WITH_SHARED, build, ready, texts

from audit.corpus import TokenSequence
from audit.engine import Engine, Measurement
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare

ZERO = Intervention("zero")
VALUES = ["delta_loss", "kl", "js", "tv", "top1_flip", "delta_logit", "contribution_norm", "gap_norm", "routing_weight"]
SCOPES = ["token", "sequence"]
ASKED = [
    ZERO,
    Intervention("renormalize"),
    Intervention("reroute"),
    Intervention("mean"),
    Intervention("resample", draws=2),
    Intervention("scale", factor=1.5),
    Intervention("zero", Target("all")),
]


def measure(
    model: MoEModel,
    sequences: Sequence[TokenSequence],
    positions: Sequence[np.ndarray] | None = None,
    interventions: Sequence[Intervention] = ASKED,
    *,
    layers: Sequence[int] | None = None,
    micro_batch: int = 64,
    identity_every: int = 2,
    calibrated: bool = True,
    method: str = "auto",
    seed: int = 0,
    **options: object,
) -> Measurement:
    engine = Engine(
        model, memory=2**62, micro_batch=micro_batch, identity_every=identity_every, method=method, seed=seed
    )
    calibration = engine.observe(texts((20, 11), 50, first=90), stored_outputs=4) if calibrated else None
    return engine.measure(
        sequences,
        [np.arange(len(s.token_ids)) for s in sequences] if positions is None else positions,
        layers=list(model.sites)[1:] if layers is None else layers,
        interventions=interventions,
        calibration=calibration,
        **options,  # type: ignore[arg-type]
    )


def keyed(measured: Measurement) -> pd.DataFrame:
    return reference.keyed(measured.effects)


def same(a: pd.DataFrame, b: pd.DataFrame, tolerance: float = 2e-6) -> None:
    assert a.index.tolist() == b.index.tolist()
    assert len(a)
    for name in VALUES:
        np.testing.assert_allclose(
            a[name].to_numpy(float), b[name].to_numpy(float), rtol=tolerance, atol=tolerance, err_msg=name
        )


# ---- nothing and everything ----


@pytest.mark.parametrize("scope", SCOPES)
def test_an_expert_that_is_not_routed_has_exactly_no_effect(scope: str) -> None:
    model, sequences = ready("qwen3_moe"), texts((7, 5), 3)
    clean = [reference.clean_run(model, torch.from_numpy(s.token_ids)).index_TK[1] for s in sequences]
    unused = sorted(set(range(8)) - set(torch.cat(clean).flatten().tolist()))
    used = sorted(set(range(8)) - set(unused))
    assert unused
    for target in (Target("each", experts=tuple(unused)), Target("listed", experts=tuple(unused))):
        for method in ("sweep", "oracle"):
            measured = measure(
                model, sequences, interventions=[Intervention("zero", target)], layers=[1], scope=scope, method=method
            )
            assert set(measured.effects.to_pandas()["unit"]) == {"identity"}
    # In one world with a used expert they change nothing: not a bit.
    only = measure(
        model,
        sequences,
        interventions=[Intervention("zero", Target("listed", experts=(used[0],)))],
        layers=[1],
        scope=scope,
    )
    both = measure(
        model,
        sequences,
        interventions=[Intervention("zero", Target("listed", experts=(used[0], *unused)))],
        layers=[1],
        scope=scope,
    )
    assert only.effects.equals(both.effects)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_factor_of_one_has_exactly_no_effect_in_float64(scope: str) -> None:
    model = ready("gpt_oss")  # the one family here that computes in float64 throughout
    measured = measure(model, texts((9, 4)), interventions=[Intervention("scale", factor=1.0)], scope=scope)
    effects = measured.effects.to_pandas()
    assert set(effects["unit"]) == {"identity", "expert"}
    assert effects["gap_norm"].max() == 0.0
    assert effects[["kl", "js", "tv"]].max().max() < 1e-20
    assert effects[["delta_loss", "delta_logit"]].abs().max().max() < 1e-12
    assert not effects["top1_flip"].any()
    assert sum(rows for rows, _ in measured.routing_changes.values()) == (effects["unit"] == "identity").sum()
    assert all(changed == 0 for _, changed in measured.routing_changes.values())


def blockless(model: MoEModel, layer: int, ids: torch.Tensor, position: int | None) -> torch.Tensor:
    """Logits with the routed output of a layer taken away at a position, or everywhere."""

    def without(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[slice(None) if position is None else position] = 0.0
        return output

    handle = model.sites[layer].experts.register_forward_hook(without)
    try:
        with torch.inference_mode(), model.own_attention():
            return model.module(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", SWEEP)
def test_all_experts_removed_is_the_block_without_its_routed_output(family: str, scope: str) -> None:
    model, sequence = ready(family), texts((6,), 8)
    layer = list(model.sites)[-2]
    measured = measure(
        model, sequence, interventions=[Intervention("zero", Target("all"))], layers=[layer], scope=scope
    )
    found = keyed(measured)
    ids = torch.from_numpy(sequence[0].token_ids)
    clean = reference.clean_run(model, ids)
    for (_, t, *_), row in found.iterrows():
        logits = blockless(model, layer, ids, t if scope == "token" else None)[t]
        want = reference.plain_outcomes(
            clean.logits_TV[t].double().numpy(), logits.double().numpy(), int([*ids, -1][t + 1])
        )
        assert row["kl"] == pytest.approx(want["kl"], abs=1e-6)
        assert row["gap_norm"] == pytest.approx(float(clean.routed_TD[layer][t].norm()), rel=1e-5)
    assert len(found) == 6


@pytest.mark.parametrize("method", ["sweep", "oracle"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", ["flex_olmo", "afmoe"])
def test_nothing_remains_of_removed_experts_for_a_norm_to_blow_up(
    family: str, dtype: torch.dtype, tolerance: float, scope: str, method: str
) -> None:
    """These families normalise what the block returns: a rounding error left of y - c would come out at full size."""
    model, sequence = prepare(build(family, 0, dtype), linear="torch"), texts((6,), 8)
    layer = list(model.sites)[-1]
    asked = [Intervention("zero", Target("all"))]
    options = {"scope": scope, "method": method, "calibrated": False}
    found = keyed(measure(model, sequence, interventions=asked, layers=[layer], **options))  # type: ignore[arg-type]
    ids = torch.from_numpy(sequence[0].token_ids)
    clean = reference.clean_run(model, ids)
    for (_, t, *_), row in found.iterrows():
        logits = blockless(model, layer, ids, t if scope == "token" else None)[t]
        want = reference.plain_outcomes(clean.logits_TV[t].double().numpy(), logits.double().numpy(), -1)
        assert row["kl"] == pytest.approx(want["kl"], rel=tolerance, abs=tolerance)
        assert row["tv"] == pytest.approx(want["tv"], abs=tolerance)


@pytest.mark.parametrize("family", SWEEP)
def test_contributions_sum_to_the_routed_output(family: str) -> None:
    """||sum of c|| over all slots is the norm of what the experts module returns, and each ||c|| that of its part."""
    model, sequence = ready(family, 1), texts((6,), 2)
    layer = list(model.sites)[-1]
    found = keyed(
        measure(model, sequence, interventions=[ZERO, Intervention("zero", Target("all"))], layers=[layer])
    ).reset_index()
    clean = reference.clean_run(model, torch.from_numpy(sequence[0].token_ids))
    for t in range(6):
        here = found[found["position"] == t]
        whole = float(clean.routed_TD[layer][t].norm())
        assert here[here["unit"] == "set"]["contribution_norm"].item() == pytest.approx(whole, rel=1e-5)
        total = torch.zeros_like(clean.routed_TD[layer][t])
        for expert, slot, norm, weight in here[here["unit"] == "expert"][
            ["expert", "slot", "contribution_norm", "routing_weight"]
        ].itertuples(index=False):
            assert clean.index_TK[layer][t, int(slot)] == expert
            assert weight == pytest.approx(float(clean.weights_TK[layer][t, int(slot)]), rel=1e-6)
            part = weight * reference.expert_output(model, layer, clean.x_TD[layer][t], int(expert))
            assert norm == pytest.approx(float(part.norm()), rel=1e-5)
            total += part
        torch.testing.assert_close(total, clean.routed_TD[layer][t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(WITH_SHARED))
def test_the_shared_experts_move_the_block_by_their_output(family: str) -> None:
    """zero and scale of the shared experts: the norms are those of the parts of the output."""
    model, sequence = ready(family), texts((5,), 4)
    layer = list(model.sites)[-1]
    asked = [Intervention("zero", Target("shared")), Intervention("scale", Target("shared"), factor=1.7)]
    found = keyed(measure(model, sequence, interventions=asked, layers=[layer])).reset_index()
    zero, scaled = (found[found["intervention"] == kind] for kind in ("zero", "scale"))
    assert len(zero) == len(scaled) == 5
    assert zero["gap_norm"].min() > 0.01
    np.testing.assert_allclose(scaled["gap_norm"], 0.7 * zero["gap_norm"].to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(zero["contribution_norm"], zero["gap_norm"].to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(scaled["contribution_norm"], zero["gap_norm"].to_numpy(), rtol=1e-5)
    assert zero["routing_weight"].isna().all()


def test_interventions_that_must_agree_do() -> None:
    """Different words for one thing: scale 0 is zero, one listed expert is that expert, both slots are all of them."""
    model, sequences = ready("deepseek_v3"), texts((8, 3), 6)

    def values(intervention: Intervention) -> pd.DataFrame:
        found = keyed(measure(model, sequences, interventions=[intervention])).reset_index()
        return found.sort_values(["sequence", "position", "layer", "slot"])[VALUES].reset_index(drop=True)

    pairs = [
        (ZERO, Intervention("scale", factor=0.0)),
        (Intervention("zero", Target("all")), Intervention("zero", Target("highest", count=2))),
        (Intervention("zero", Target("all")), Intervention("zero", Target("listed", experts=tuple(range(8))))),
        (Intervention("mean", Target("highest", count=2)), Intervention("mean", Target("lowest", count=2))),
    ]
    for one, other in pairs:
        a, b = values(one), values(other)
        assert len(a)
        np.testing.assert_allclose(a.to_numpy(float), b.to_numpy(float), rtol=1e-5, atol=1e-6)
    each = keyed(measure(model, sequences, interventions=[Intervention("reroute", Target("each", experts=(3,)))]))
    listed = keyed(measure(model, sequences, interventions=[Intervention("reroute", Target("listed", experts=(3,)))]))
    np.testing.assert_allclose(each["kl"].to_numpy(), listed["kl"].to_numpy(), rtol=1e-5, atol=1e-7)
    assert len(each) > 3


# ---- how the work is cut up ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "afmoe"])
def test_fewer_positions_give_the_same_numbers(family: str, scope: str) -> None:
    model, sequences = ready(family), texts((12, 1, 9), 11)
    every = keyed(measure(model, sequences, scope=scope)).reset_index()
    some = [np.array([0, 5, 11]), np.array([], dtype=np.int64), np.array([8])]
    few = keyed(measure(model, sequences, some, scope=scope))
    wanted = {(s.index, int(t)) for s, at in zip(sequences, some, strict=True) for t in at}
    inside = [(s, t) in wanted for s, t in zip(every["sequence"], every["position"], strict=True)]
    same(every[inside].set_index(reference.KEY).sort_index(), few)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoeshared"])
def test_any_micro_batch_gives_the_same_numbers(family: str, scope: str) -> None:
    model, sequences = ready(family, 1), texts((11, 3), 12)
    whole = keyed(measure(model, sequences, micro_batch=10_000, scope=scope))
    for rows in (1, 7, 64):
        same(keyed(measure(model, sequences, micro_batch=rows, scope=scope)), whole)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "exaone_moe"])
def test_sequences_together_give_the_same_as_alone(family: str, scope: str) -> None:
    model, sequences = ready(family), texts((10, 1, 6), 13)
    together = keyed(measure(model, sequences, scope=scope))
    alone = pd.concat([keyed(measure(model, [s], scope=scope)) for s in sequences]).sort_index()
    same(alone, together)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_task_run_again_is_bit_identical(dtype: torch.dtype, scope: str) -> None:
    sequences = texts((9, 4), 14)
    first, second = (
        measure(
            validate(prepare(build("deepseek_v3", 2, dtype), linear="torch")), sequences, scope=scope, micro_batch=23
        )
        for _ in range(2)
    )
    assert first.effects.num_rows > 100
    assert first.effects.equals(second.effects)
    assert first.tokens.equals(second.tokens)
    assert first.routing_changes == second.routing_changes


def test_layers_and_interventions_do_not_disturb_each_other() -> None:
    model, sequences = ready("granitemoeshared"), texts((7, 2), 15)
    together = keyed(measure(model, sequences, layers=[0, 2, 3])).reset_index()
    for layer in (0, 2, 3):
        alone = keyed(measure(model, sequences, layers=[layer]))
        same(together[together["layer"] == layer].set_index(reference.KEY).sort_index(), alone)
    backwards = keyed(measure(model, sequences, layers=[3, 0, 2], interventions=ASKED[::-1]))
    same(together.set_index(reference.KEY).sort_index(), backwards)


@pytest.mark.parametrize("scope", SCOPES)
def test_draws_belong_to_the_token_and_the_seed(scope: str) -> None:
    model, sequences = ready("gpt_oss"), texts((9, 4), 16)
    asked = [Intervention("resample", draws=3)]

    def run(sequences: Sequence[TokenSequence], seed: int) -> pd.DataFrame:
        return keyed(measure(model, sequences, interventions=asked, seed=seed, scope=scope))

    whole = run(sequences, 0)
    gaps = whole["gap_norm"].unstack("draw")
    assert (gaps.nunique(axis=1) > 1).mean() > 0.5  # draws differ, though two may pick the same stored output
    other = run(sequences, 1)
    assert (np.abs(other["gap_norm"] - whole["gap_norm"]) > 1e-3).mean() > 0.3
    moved = [TokenSequence(7, s.document, s.domain, s.token_ids, s.sentence, s.special) for s in sequences[:1]]
    renumbered = run(moved, 0)["gap_norm"].to_numpy()
    assert (np.abs(renumbered - whole.xs(0, level="sequence")["gap_norm"].to_numpy()) > 1e-3).mean() > 0.3
    same(run(sequences[1:], 0), whole.loc[[1]])


# ---- the oracle ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", SWEEP)
def test_the_oracle_is_the_same_engine_only_slower(family: str, scope: str) -> None:
    model = ready(family, 1)
    sequences, positions = texts((8, 3), 17), [np.array([0, 7]), np.array([1])]
    asked = [*ASKED, Intervention("renormalize", Target("listed", experts=(0, 1, 2, 3, 4)))]
    if model.description.shared_experts:
        asked.append(Intervention("scale", Target("shared"), factor=0.5))
    options = {"layers": [list(model.sites)[-2]], "interventions": asked, "scope": scope}
    fast, slow = (
        measure(model, sequences, positions, method=method, **options)  # type: ignore[arg-type]
        for method in ("sweep", "oracle")
    )
    assert fast.method == ("sweep" if scope == "token" else "suffix")
    assert slow.method == "oracle"
    assert fast.skipped == slow.skipped
    same(keyed(fast), keyed(slow), 1e-5)
    pd.testing.assert_frame_equal(fast.tokens.to_pandas(), slow.tokens.to_pandas(), rtol=1e-5, atol=1e-6)
    controls = [m.effects.to_pandas().query("unit == 'identity'") for m in (fast, slow)]
    assert controls[0][["sequence", "position", "layer"]].values.tolist() == (
        controls[1][["sequence", "position", "layer"]].values.tolist()
    )
    assert len(controls[0]) == 2  # of three audited tokens every second
    assert all(c["kl"].max() < 1e-8 for c in controls)
