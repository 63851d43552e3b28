"""Attribution against a backward of every token's own loss through the library's model, and against finite differences.

The finite differences are those of measured effects: attribution is the derivative of the loss under ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import RECURRENT, SWEEP, Float64Throughout, build, ready, texts
from torch import Tensor
from torch.nn import functional as F

from audit.corpus import TokenSequence
from audit.engine import Engine
from audit.engine.attribution import loss_gradients
from audit.engine.cost import Sizes, gradient_rows_for
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare

LENGTHS = (13, 6)
POSITIONS = [np.array([0, 4, 5, 11, 12]), np.array([0, 3, 5])]
EACH = [Intervention("zero")]
KEY = ["sequence", "position", "layer", "expert"]


def attributions(engine: Engine, sequences: Sequence[TokenSequence], positions: Any, layers: Sequence[int]) -> Any:
    """Column by key, as the engine measures it."""
    effects = engine.measure(sequences, positions, layers=layers, interventions=EACH, attribution=True).effects
    frame = effects.to_pandas()
    return frame[frame["unit"] == "expert"].set_index(KEY)["attribution"].sort_index()


def own_losses(
    model: MoEModel, sequences: Sequence[TokenSequence], positions: Any, layers: Sequence[int], summed: bool = False
) -> pd.Series:
    """The same by a forward and a backward per token; ``summed``: of the sequence's summed loss instead."""
    rows: dict[tuple[int, int, int, int], float] = {}
    for sequence, at in zip(sequences, positions, strict=True):
        ids = torch.from_numpy(sequence.token_ids)
        clean = reference.clean_run(model, ids)
        for t in at.tolist():
            gradient_TD = _gradients(model, ids, layers, t, summed) if t + 1 < len(ids) else {}
            for layer in layers:
                for slot, expert in enumerate(clean.index_TK[layer][t].tolist()):
                    output_D = reference.expert_output(model, layer, clean.x_TD[layer][t], expert)
                    contribution_D = clean.weights_TK[layer][t, slot] * output_D
                    value = -float(gradient_TD[layer][t] @ contribution_D.clone()) if gradient_TD else np.nan
                    rows[(sequence.index, t, layer, expert)] = value
    return pd.Series(rows).rename_axis(KEY).sort_index()


def _gradients(model: MoEModel, ids: Tensor, layers: Sequence[int], t: int, summed: bool) -> dict[int, Tensor]:
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[layer] = output

        return hook

    handles = [model.sites[layer].experts.register_forward_hook(keep(layer)) for layer in layers]
    try:
        with model.own_attention():
            embedded = model.module.get_input_embeddings()(ids[None]).requires_grad_()  # type: ignore[operator]
            logits_TV = model.module(inputs_embeds=embedded, use_cache=False).logits[0]
        loss_T = F.cross_entropy(logits_TV[:-1].double(), ids[1:], reduction="none")
        (loss_T.sum() if summed else loss_T[t]).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return {layer: y.grad for layer, y in outputs.items() if y.grad is not None}


def relative_distance(ours: pd.Series, theirs: pd.Series) -> float:
    """Largest difference, in units of the largest attribution; both null at the same keys."""
    assert ours.index.equals(theirs.index)
    assert (ours.isna() == theirs.isna()).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", SWEEP)
def test_a_backward_of_each_tokens_own_loss_gives_the_same(family: str, seed: int) -> None:
    with Float64Throughout():
        model = prepare(build(family, seed))
        layers, sequences = list(model.sites)[::2], texts(LENGTHS, seed, model.description.vocabulary)
        engine = Engine(model, memory=2**62)
        assert engine.method == "sweep"
        ours = attributions(engine, sequences, POSITIONS, layers)
        theirs = own_losses(model, sequences, POSITIONS, layers)
    assert relative_distance(ours, theirs) < 2e-7  # of the table's float32
    assert theirs.abs().median() > 1e-4
    assert theirs.isna().any()
    assert set(theirs.index[theirs.isna()].droplevel(["layer", "expert"])) == {(0, 12), (1, 5)}


@pytest.mark.parametrize("family", RECURRENT)
def test_families_without_plain_attention_get_one_backward_per_token(family: str) -> None:
    model = ready(family, 1)
    layers, sequences = list(model.sites)[1:3], texts(LENGTHS, 3, model.description.vocabulary)
    engine = Engine(model, memory=2**62)
    assert engine.method == "oracle"
    positions = [np.array([0, 7, 12]), np.array([2])]
    distance = relative_distance(
        attributions(engine, sequences, positions, layers), own_losses(model, sequences, positions, layers)
    )
    assert distance < 1e-5  # routers and norms of these models round to float32


def test_the_oracle_gives_the_same_as_the_sweep() -> None:
    with Float64Throughout():
        model = prepare(build("qwen2_moe", 3))
        sequences = texts(LENGTHS, 3)
        sweep, oracle = (Engine(model, memory=2**62, method=m) for m in ("sweep", "oracle"))
        found = [attributions(engine, sequences, POSITIONS, [0, 2]) for engine in (sweep, oracle)]
    assert relative_distance(*found) < 2e-7


def test_a_backward_of_the_summed_loss_is_another_quantity() -> None:
    model, sequences = ready("olmoe", 1), texts((13,), 1)
    positions = [np.arange(12)]
    own, summed = (own_losses(model, sequences, positions, [0, 2], summed) for summed in (False, True))
    ours = attributions(Engine(model, memory=2**62), sequences, positions, [0, 2])
    assert relative_distance(ours, own) < 1e-5
    assert relative_distance(ours, summed) > 0.05
    last = summed.xs(11, level="position")  # nobody after it has a loss
    pd.testing.assert_series_equal(last, own.xs(11, level="position"), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["olmoe", "phimoe", "deepseek_v3", "gpt_oss"])
def test_attribution_is_the_derivative_of_the_loss_under_scale(family: str) -> None:
    step = 1e-3
    around = [Intervention("scale", factor=1.0 + sign * step) for sign in (1, -1)]
    with Float64Throughout():
        model = prepare(build(family, 2))
        layer, sequences, positions = list(model.sites)[1], texts((9,), 4), [np.arange(8)]
        engine = Engine(model, memory=2**62)
        first_order = attributions(engine, sequences, positions, [layer])
        losses = reference.effects(model, sequences, [at.tolist() for at in positions], [layer], around, "token")
    frame = losses.reset_index().pivot(index=KEY, columns="parameter", values="delta_loss")
    slope = (frame[1.0 + step] - frame[1.0 - step]) / (2 * step)
    assert relative_distance(first_order, -slope) < 1e-5  # towards 0, where the expert says nothing
    assert (first_order.abs() > 1e-4).any()


def test_neither_sampled_positions_nor_the_size_of_a_backward_change_it() -> None:
    model, sequences = ready("gpt_oss", 1), texts((13, 9), 6)
    everywhere = [np.arange(13), np.arange(9)]
    whole = attributions(Engine(model, memory=2**62), sequences, everywhere, [1, 3])
    for micro_batch in (1, 5):
        one = attributions(Engine(model, memory=2**62, micro_batch=micro_batch), sequences, everywhere, [1, 3])
        assert relative_distance(one, whole) < 1e-5
    few = [np.array([2, 11]), np.array([7])]
    sampled = attributions(Engine(model, memory=2**62), sequences, few, [1, 3])
    assert relative_distance(sampled, whole[sampled.index]) < 1e-5
    above = attributions(Engine(model, memory=2**62), sequences, few, [3])  # begins at another layer
    assert relative_distance(above, whole[above.index]) < 1e-5


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.02)])
def test_narrow_types_give_it_to_their_precision(dtype: torch.dtype, most: float) -> None:
    sequences, positions = texts((13,), 5), [np.arange(12)]
    narrow = build("mixtral", 1).to(dtype)
    model = validate(prepare(narrow))
    wide = validate(prepare(build("mixtral", 1).to(dtype).double()))
    ours, exact = (attributions(Engine(m, memory=2**62), sequences, positions, [2]) for m in (model, wide))
    both = pd.concat([ours, exact], axis=1, join="inner").to_numpy()  # routing may differ
    assert len(both) >= 0.8 * len(exact)
    assert np.median(np.abs(both[:, 0] - both[:, 1])) < most * np.median(np.abs(both[:, 1]))


def test_what_is_saved_for_a_backward_stays_within_its_bound() -> None:
    for family in ("olmoe", "gpt_oss", "deepseek_v3"):
        model = ready(family, 1, torch.float32)
        engine, length, first = Engine(model, memory=2**62), 64, 1
        sequences = texts((length,), 1, model.description.vocabulary)
        request = engine._request(sequences, [np.arange(length)], [first], EACH, "token", False, None, {}, True, False)
        weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
        layers: list[dict[int, int]] = [{}]  # what each layer saved, by its place in memory
        going_back = [False]

        def note(tensor: Tensor, layers: Any = layers, back: Any = going_back, weights: Any = weights) -> Tensor:
            if back.pop():
                layers.append({})
            back.append(False)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                layers[-1][storage.data_ptr()] = storage.nbytes()
            return tensor

        def use(tensor: Tensor, back: Any = going_back) -> Tensor:
            back[0] = True
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, use):
            loss_gradients(model, request, length)
        assert len(layers) == len(model.layers) - first + 1  # and the head
        most = max(sum(saved.values()) for saved in layers)
        bound = length * (Sizes(model).gradient_row_bytes(length) + Sizes(model).gradient_bytes(first))
        assert 0.1 * bound < most <= bound, family


def test_a_small_budget_means_fewer_rows_per_backward() -> None:
    sizes = Sizes(ready("olmoe", 1))
    row, clean, given = sizes.gradient_row_bytes(20), sizes.gradient_bytes(1), sizes.given_bytes(1)
    assert gradient_rows_for(sizes, 20 * clean + 9 * given + 7 * row + row // 2, 20, 9, 20, 1) == 7
    assert gradient_rows_for(sizes, 1, 20, 9, 20, 1) == 1


def test_other_rows_have_none_and_it_costs_four_forwards_of_a_row() -> None:
    model, sequences = ready("olmoe", 1), texts((9,), 1)
    asked = [
        Intervention("reroute"),
        Intervention("zero", Target("all")),
        Intervention("resample", draws=2),
    ]
    engine = Engine(model, memory=2**62)
    calibration = engine.observe(texts((20,), 9, first=50), stored_outputs=2)
    measured = engine.measure(
        sequences, [np.arange(8)], layers=[1], interventions=asked, calibration=calibration, attribution=True
    )
    frame = measured.effects.to_pandas()
    assert (frame["attribution"].notna() == (frame["unit"] == "expert")).all()
    by_token = frame[frame["unit"] == "expert"].groupby(["position", "expert"])["attribution"]
    assert (by_token.nunique() == 1).all()  # it belongs to the expert and the token, not to what is done
    without = engine.measure(sequences, [np.arange(8)], layers=[1], interventions=EACH)
    assert without.effects["attribution"].null_count == len(without.effects)

    plain, more, most = (engine.cost([9], [n], [1], (), attribution=n > 0).flops for n in (0, 1, 5))
    row = 4 * sum(2.0 * a + 2.0 * 9 * 64 for a in engine.sizes.active[1:]) + 3 * 2.0 * 64 * 128
    identities = [engine.cost([9], [n], [1], ()).flops - plain for n in (1, 5)]
    assert most - more - (identities[1] - identities[0]) == pytest.approx(4 * row)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "sequence", "attribution": True}, "attribution: true does not go with scope sequence"),
        ({"interventions": [Intervention("zero", Target("all"))], "attribution": True}, "target each"),
        ({"interventions": [Intervention("reroute")], "redistribution": True}, "redistribution: true needs zero"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(ready("olmoe", 1), memory=2**62).measure(
            texts((6,), 1), [np.arange(3)], **{"layers": [1], "interventions": EACH, **options}
        )
