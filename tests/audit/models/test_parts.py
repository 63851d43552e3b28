"""Rows, head, seam and router taken by themselves."""

from __future__ import annotations

import pytest
import torch
from families import SWEEP, Float64Throughout, build, ready, texts
from torch import nn

from audit.models.router import Strike, correction_biases
from audit.models.rows import Rows, clean_forward
from audit.models.seam import map_tensors, record_calls, replaced, tensors_in


@pytest.mark.parametrize("family", SWEEP)
def test_sequences_side_by_side_give_the_librarys_logits(family: str) -> None:
    model = ready(family, 1)
    sequences = [torch.from_numpy(s.token_ids) for s in texts((11, 1, 6), 2)]
    with torch.inference_mode(), Float64Throughout():
        hidden, attending = clean_forward(Rows(model.module, model.layers, model.position_dims, sequences))
        found = model.head.logits(hidden)
        with model.own_attention():
            want = torch.cat([model.module(input_ids=s[None], use_cache=False).logits[0] for s in sequences])
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    assert len(attending) == 4
    assert all(len(modules) == 1 for modules in attending)


def test_rows_that_attend_together_fit_the_cache_as_far_as_products_allow() -> None:
    model = ready("olmoe", 1)
    sequences = [torch.from_numpy(s.token_ids) for s in texts((64, 5), 2)]
    with torch.inference_mode():
        rows, few = (Rows(model.module, model.layers, model.position_dims, sequences, most) for most in (None, 40))
    assert [rows.block(heads) for heads in (1, 16, 32, 64, 4096)] == [512, 512, 256, 128, 128]  # 2**19 / (64 heads)
    assert few.block(1) == few.block(64) == 40


@pytest.mark.parametrize("family", SWEEP)
def test_the_change_of_logits_is_linear_in_the_change_of_normed_rows(family: str) -> None:
    model = ready(family, 1)
    assert model.head.linear
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.inference_mode():
        change = model.head.change(model.head.normed(a), model.head.normed(b))
        torch.testing.assert_close(change, model.head.logits(a) - model.head.logits(b), rtol=1e-9, atol=1e-9)


def test_replacing_is_undone_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = module(x)

    def fail_within() -> None:
        with replaced({module: lambda x: x * 7}):
            assert module(x).tolist() == [[7.0, 7.0]]
            with replaced({module: lambda x: x * 9}):
                assert module(x).tolist() == [[9.0, 9.0]]
            assert module(x).tolist() == [[7.0, 7.0]]
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert torch.equal(module(x), before)
    assert "forward" not in module.__dict__


def test_tensors_are_found_wherever_they_are() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    nested = {"x": (a, [b, None]), "y": 3, "z": c}
    assert [len(t) for t in tensors_in(nested)] == [1, 2, 3]
    doubled = map_tensors(nested, lambda t: 2 * t)
    assert doubled["x"][1][0].tolist() == [2.0, 2.0]
    assert doubled["x"][1][1] is None
    assert doubled["y"] == 3
    assert isinstance(doubled["x"], tuple)


def test_recorded_calls_are_the_layers_own_arguments() -> None:
    model = build("gpt_oss")
    ids = torch.arange(3, 14)[None]
    given: list[torch.Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        calls = record_calls(model, model.model.layers, ids)
    assert len(calls) == 4
    assert torch.equal(calls[1].kwargs["position_embeddings"][0], given[0])
    assert "past_key_values" not in calls[1].kwargs
    assert calls[0].hidden.shape == (1, 11, 64)


# ---- striking ----


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "afmoe"])
def test_correction_biases_are_found(family: str) -> None:
    block = ready(family, 1).sites[3].block
    biases = correction_biases(block, 8)
    named = [
        t
        for n, t in (*block.named_buffers(), *block.named_parameters())
        if n.endswith(("correction_bias", "expert_bias"))
    ]
    assert len(named) == 1
    assert any(t is named[0] for t in biases)


def test_minus_infinity_before_a_sigmoid_is_not_enough() -> None:
    """A struck expert with a large correction bias: its sigmoid is 0, its biased score still the best."""
    model = build("deepseek_v3", 1, n_group=1, topk_group=1)
    block = model.model.layers[2].mlp
    with torch.no_grad():
        block.gate.e_score_correction_bias[5] = 100.0
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    removed = torch.zeros(6, 8, dtype=torch.bool)
    removed[:, 5] = True
    with torch.inference_mode():
        assert (block.gate(x)[2] == 5).any(1).all()
        with Strike(removed, correction_biases(block, 8)) as strike:
            _, weights, index = block.gate(x)
    assert (strike.linear_hits, strike.bias_hits) == (1, 1)
    assert not (index == 5).any()
    assert torch.isfinite(weights).all()


def test_rows_are_struck_one_by_one() -> None:
    """As many rows as experts as hidden dimensions: nothing may be taken for something else."""
    model = build("olmoe", 2, hidden_size=8, num_attention_heads=2)
    router = model.model.layers[0].mlp.gate
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        logits, _, index = router(x)
        removed = torch.zeros(8, 8, dtype=torch.bool)
        removed[2, index[2, 0]] = True
        removed[5, index[5]] = True
        with Strike(removed, []):
            _, weights, new = router(x)
    untouched = [0, 1, 3, 4, 6, 7]
    assert torch.equal(new[untouched], index[untouched])
    for row in (2, 5):
        left = logits[row].masked_fill(removed[row], float("-inf"))
        assert new[row].tolist() == left.topk(2).indices.tolist()
        torch.testing.assert_close(
            weights[row], torch.softmax(left.float(), -1).topk(2).values.double(), rtol=1e-6, atol=0
        )
