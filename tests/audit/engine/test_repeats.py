"""Repeats: which effects are computed a second time, under which rounding, and beside which effects they end up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from families import ready, texts
from torch import Tensor

from audit.calibration import Calibration
from audit.effects import REPEATED
from audit.engine import Engine
from audit.engine import rounding as rounding_module
from audit.engine.rounding import moved, other_rounding
from audit.interventions import Intervention, Target

SEQUENCES = texts((4, 9, 3, 5), 71, first=3)  # numbers 4 and 6 are every second
POSITIONS = [np.array([1, 3]), np.arange(9), np.array([0]), np.array([1, 2, 4])]
ASKED = [Intervention("reroute"), Intervention("zero"), Intervention("zero", Target("all"))]
KEY = ["sequence", "position", "layer", "unit", "intervention", "target", "expert", "draw"]
SCOPES = ["token", "sequence"]


@cache
def calibration(family: str, dtype: torch.dtype) -> Calibration:
    """Made once, under the usual rounding."""
    return Engine(ready(family, 1, dtype), memory=2**62).observe(texts((20, 25), 60), stored_outputs=4)


def measured(
    scope: str = "token",
    asked: list[Intervention] = ASKED,
    method: str = "auto",
    micro_batch: int = 64,
    seed: int = 0,
    family: str = "deepseek_v2",
    dtype: torch.dtype = torch.float64,
) -> pd.DataFrame:
    engine = Engine(
        ready(family, 1, dtype), memory=2**62, micro_batch=micro_batch, identity_every=2, seed=seed, method=method
    )
    found = engine.measure(
        SEQUENCES,
        POSITIONS,
        layers=[1, 3],
        interventions=asked,
        scope=scope,  # type: ignore[arg-type]
        calibration=calibration(family, dtype),
    )
    return found.effects.to_pandas()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_move_by_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    values = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    values[0, :4] = torch.tensor([0.0, float("inf"), float("nan"), -1.0]).to(dtype)
    found = moved(values, 5)
    assert torch.equal(found[0, :2], values[0, :2])
    assert found[0, 2].isnan()
    finite = values.isfinite() & (values != 0)
    # The unit from the exponent: bits of the mantissa below it. Below a power of two the next number is half as far.
    _, exponent = np.frexp(values.double().numpy())
    unit = torch.finfo(dtype).eps * np.exp2(exponent.astype(np.float64) - 1)
    step = ((found.double() - values.double()).abs().numpy() / unit)[finite.numpy()]
    assert set(step.tolist()) <= {1.0, 0.5}
    assert (step == 1.0).mean() > 0.9
    up = (found.double() > values.double())[finite].double().mean()
    assert 0.45 < up < 0.55
    assert torch.equal(moved(values[7:9], 5), found[7:9])  # whatever else is in the batch
    assert 0.4 < (moved(values, 6) == found).double().mean() < 0.6


@pytest.mark.parametrize("method", ["sweep", "oracle"])
def test_one_effect_per_token_and_layer_is_repeated(method: str) -> None:
    """Of the first intervention, in every second sequence."""
    effects = measured(method=method)
    repeated = effects[effects["repeated"]]
    at = [*((4, position) for position in range(9)), (6, 1), (6, 2), (6, 4)]
    want = [(sequence, position, layer) for sequence, position in at for layer in (1, 3)]
    assert sorted(repeated[["sequence", "position", "layer"]].itertuples(index=False, name=None)) == want
    assert set(repeated["intervention"]) == {"reroute"}
    assert set(repeated["unit"]) == {"expert"}
    assert set(repeated["slot"]) == {0, 1}  # not always the same
    last = [(s, t) in {(4, 8), (6, 4)} for s, t in zip(repeated["sequence"], repeated["position"], strict=True)]
    for name in REPEATED:
        without = last if name in ("delta_loss", "delta_logit") else [False] * 24
        assert repeated[f"repeat_{name}"].isna().tolist() == without
        assert effects[~effects["repeated"]][f"repeat_{name}"].isna().all()


def test_one_expert_per_sequence_and_layer_is_repeated_where_it_is_read() -> None:
    effects = measured("sequence")
    first = effects[(effects["intervention"] == "reroute") & (effects["sequence"].isin([4, 6]))]
    for _, rows in first.groupby(["sequence", "layer"]):
        experts = rows[rows["repeated"]]["expert"].unique()
        assert len(experts) == 1
        assert rows[rows["expert"] == experts[0]]["repeated"].all()
    assert effects["repeated"].sum() == first["repeated"].sum()
    assert first["repeated"].sum() < len(first) / 2


@pytest.mark.parametrize("scope", SCOPES)
def test_the_choice_depends_on_the_seed_and_on_nothing_else(scope: str) -> None:
    def chosen(**options: object) -> list[tuple[object, ...]]:
        effects = measured(scope, **options)  # type: ignore[arg-type]
        return list(effects[effects["repeated"]][KEY[:-1]].astype(str).sort_values(KEY[:-1]).itertuples(index=False))

    assert chosen() == chosen(micro_batch=5) == chosen(method="oracle")
    assert chosen() != chosen(seed=1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["sweep", "oracle"])
@pytest.mark.parametrize(
    "first",
    [
        Intervention("zero"),
        Intervention("resample", draws=3),
        Intervention("zero", Target("random", count=1), draws=4),
        Intervention("renormalize", Target("listed", experts=(0, 1, 2, 5))),
    ],
    ids=["each", "draws", "random sets", "listed"],
)
def test_repeats_stand_beside_their_own_effects(
    monkeypatch: pytest.MonkeyPatch, first: Intervention, scope: str, method: str
) -> None:
    """Under a rounding so coarse that it can be told from none, a repeat is what measuring everything so gives."""

    def coarse(values: Tensor, seed: int) -> Tensor:
        return values * 1.001

    asked = [Intervention("scale", Target("shared"), factor=0.5), first, Intervention("mean")]
    monkeypatch.setattr(rounding_module, "moved", coarse)
    effects = measured(scope, asked, method)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_run", Engine._compute)  # no repeats within
        with other_rounding(ready("deepseek_v2", 1, torch.float64), 0):
            wanted = measured(scope, asked, method)
    repeated = effects[effects["repeated"]].assign(experts=effects["experts"].astype(str))
    assert set(repeated["intervention"]) == {first.kind}
    assert repeated["repeat_kl"].notna().all()
    wanted = wanted.assign(experts=wanted["experts"].astype(str))
    both = repeated.merge(wanted, on=[*KEY, "experts"], suffixes=("", "_wanted"))
    assert len(both) == len(repeated) >= 5
    far = 0.0
    for name in REPEATED:
        np.testing.assert_allclose(both[f"repeat_{name}"], both[f"{name}_wanted"], rtol=1e-5, atol=1e-7)
        far = max(far, (both[f"repeat_{name}"] - both[name]).abs().max())
    assert far > 1e-4  # else the comparison says nothing


def test_a_token_that_is_routed_otherwise_has_no_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def random(values: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return values + torch.randn(values.shape, generator=generator).to(values) * 0.3

    monkeypatch.setattr(rounding_module, "moved", random)
    effects = measured(asked=[Intervention("zero")])
    repeated = effects[effects["repeated"]]
    assert len(repeated) == 24
    lost = repeated["repeat_kl"].isna()
    assert 0 < lost.sum() < 24
    for name in REPEATED:
        assert repeated[lost][f"repeat_{name}"].isna().all()


@pytest.mark.parametrize("scope", SCOPES)
def test_shared_experts_are_not_repeated(scope: str) -> None:
    assert not measured(scope, [Intervention("zero", Target("shared"))])["repeated"].any()


@pytest.mark.parametrize("family", ["granitemoeshared", "flex_olmo"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 3.0)])
def test_repeats_differ_by_rounding_alone(family: str, dtype: torch.dtype, most: float) -> None:
    effects = measured(asked=[Intervention("zero")], family=family, dtype=dtype)
    apart = (effects["repeat_delta_loss"] - effects["delta_loss"]).abs().dropna()
    assert apart.median() > 0
    assert apart.max() < most


@pytest.mark.parametrize("scope", SCOPES)
def test_the_model_is_left_as_it_was(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured(scope)
    own: Callable[..., object] = Engine._compute

    def compute(self: Engine, request: object, micro_batch: int) -> object:
        if getattr(request, "only", None) is not None:
            raise KeyboardInterrupt
        return own(self, request, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_compute", compute)
        with pytest.raises(KeyboardInterrupt):
            measured(scope)
    pd.testing.assert_frame_equal(measured(scope), before)
