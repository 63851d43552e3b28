"""The released code's metrics, against a plain loop over positions that shares nothing with the code under test.

The loop takes what enters each MoE block in a forward of its own and computes router and experts from the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import build
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from audit.models import MoEModel, prepare
from audit.published.released_code import METRICS, released_metrics, released_metrics_of_tokens

PAD = 1
LAYER = 2


def token_ids(count: int, seed: int, longest: int = 11) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = [longest, 2, 3, *rng.integers(4, longest, count - 3)]
    return [rng.integers(3, 128, n).tolist() for n in lengths]


def entering(module: Any, block: Any, rows: list[tuple[list[int], list[int]]]) -> list[NDArray[np.float64]]:
    """Per text (ids, mask) the hidden states [T, D] that enter ``block``, each text in a forward of its own."""
    seen: list[NDArray[np.float64]] = []
    hook = block.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach().double().numpy()))
    with torch.no_grad():
        for ids, mask in rows:
            module(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]))
    hook.remove()
    return seen


def expert_output(block: Any, expert: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
    up = block.experts.gate_up_proj[expert].detach().double().numpy() @ x
    gate, value = np.split(up, 2)
    down = block.experts.down_proj[expert].detach().double().numpy()
    hidden: NDArray[np.float64] = down @ (gate / (1 + np.exp(-gate)) * value)
    return hidden


def loop(family: str, module: Any, texts: list[list[int]], top_k: int, experts: int) -> dict[str, list[float]]:
    block = module.model.layers[LAYER].mlp
    longest = max(map(len, texts))
    if family == "qwen2_moe":
        texts = [t for t in texts[:30] if len(t) >= 4] + [t for t in texts[30:] if len(t) >= 4]
        rows = [(t, [1] * len(t)) for t in texts]
    else:
        rows = []
        for t in texts:
            pad, none = [PAD] * (longest - len(t)), [0] * (longest - len(t))
            ones = [1] * len(t)
            rows.append((t + pad, ones + none) if family == "olmoe" else (pad + t, none + ones))
    router = block.gate.weight.detach().double().numpy()
    logits, weights, chosen, outputs, first = [], [], [], [], []
    counted = 28  # of the first 30 texts two are shorter than 4 tokens
    for text, hidden in enumerate(entering(module, block, rows)):
        for x in hidden:
            logit = router @ x
            share = np.exp(logit - logit.max())
            share /= share.sum()
            active = sorted(range(experts), key=lambda e: -share[e])[:top_k]
            logits.append(logit)
            weights.append({e: share[e] for e in active})
            chosen.append(active)
            if family != "qwen2_moe" or text < counted:
                out = {e: expert_output(block, e, x) for e in active}
                outputs.append({e: float(np.sqrt((o**2).sum())) for e, o in out.items()})
                first.append({e: o[:32] for e, o in out.items()})
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    lowest = min(sorted(logit)[-top_k] for logit in logits)
    for e in range(experts):
        mine = [w[e] for w in weights if e in w]
        norms = [o[e] for o in outputs if e in o]
        above = [logit[e] for logit in logits if logit[e] >= lowest]
        used = {
            "olmoe": sum(logit[e] for logit in logits) / len(logits),
            "deepseek_v2": len(mine) / len(logits),
            "qwen2_moe": len(mine) / (len(logits) * top_k),
        }[family]
        weight_of = above if family == "olmoe" else mine
        pooled = [v for o in first if e in o for v in o[e]]
        spread = (
            (float(np.std(pooled)) if pooled else 0.0)
            if family == "qwen2_moe"
            else (float(np.std(norms, ddof=1)) if len(norms) > 1 else (np.nan if norms else 0.0))
        )
        found["released_utilization"].append(used)
        found["released_mean_routing_weight"].append(sum(weight_of) / len(weight_of) if weight_of else 0.0)
        found["released_activation_norm"].append(sum(norms) / len(norms) if norms else 0.0)
        found["released_activation_std"].append(spread)
    return found


def values(table: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    of_metric = table[(table["layer"] == LAYER) & (table["metric"] == metric)].sort_values("expert")
    return of_metric["value"].to_numpy(np.float64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen2_moe"])
def test_equals_a_loop_over_positions(family: str, seed: int) -> None:
    # 40 experts: some are never active, which the released code writes as 0.
    # float32: the row of a padding position on the left sees nothing, and is not finite in float64.
    model = prepare(build(family, seed, torch.float32, experts=40, top_k=3))
    module = build(family, seed, torch.float32, experts=40, top_k=3)
    texts = token_ids(34, seed)
    table = released_metrics_of_tokens(model, texts, PAD, batch=5)
    assert len(table) == len(model.sites) * 40 * len(METRICS)
    assert set(table["label"]) == {"published_code"}
    expected = loop(family, module, texts, top_k=3, experts=40)
    for metric in METRICS:
        np.testing.assert_allclose(values(table, metric), expected[metric], rtol=2e-5, atol=1e-6, err_msg=metric)


def unlike(family: str, change: str) -> bool:
    """Whether another way to read the same texts changes the metrics of one family."""
    module = build(family, 3, torch.float32, experts=8, top_k=2)
    model, texts = prepare(module), token_ids(12, 3)
    as_released = released_metrics_of_tokens(model, texts, PAD)
    other = {
        "pad token": lambda: released_metrics_of_tokens(model, texts, PAD + 1),
        "longest text": lambda: released_metrics_of_tokens(model, [*texts[:-1], texts[-1] + [7] * 20], PAD),
        "batch": lambda: released_metrics_of_tokens(model, texts, PAD, batch=3),
    }[change]()
    return not np.allclose(as_released["value"], other["value"], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_padding_is_counted_where_it_was() -> None:
    assert unlike("olmoe", "pad token")
    assert unlike("deepseek_v2", "pad token")
    assert not unlike("qwen2_moe", "pad token")


def test_padding_reaches_the_longest_text() -> None:
    assert unlike("olmoe", "longest text")


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen2_moe"])
def test_batches_do_not_matter(family: str) -> None:
    assert not unlike(family, "batch")


def tokenized(model: MoEModel, tokenizer: PreTrainedTokenizerFast) -> MoEModel:
    model.tokenizer = tokenizer
    return model


def test_texts_are_tokenised_and_padded(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tokenized(prepare(build("olmoe", 0, vocab_size=400)), tokenizer)
    texts = ["The cat sat on the mat.", "Was it?"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(ids[0]) != len(ids[1])
    end = tokenizer.eos_token_id  # this tokenizer has no padding token
    expected = released_metrics_of_tokens(model, ids, end, layers=[1])
    pd.testing.assert_frame_equal(released_metrics(model, texts, layers=[1]), expected)
    assert tokenizer.pad_token is None


def test_mistakes_are_told_in_a_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    olmoe, qwen = prepare(build("olmoe", 0)), prepare(build("qwen2_moe", 0))
    with pytest.raises(ValueError, match=r"^model.source: this checkpoint has no tokenizer"):
        released_metrics(olmoe, ["text"])
    with pytest.raises(ValueError, match=r"^texts: there is none"):
        released_metrics(tokenized(olmoe, tokenizer), [])
    with pytest.raises(ValueError, match=r"^model.source: family 'mixtral' has no released code; known are olmoe, "):
        released_metrics_of_tokens(prepare(build("mixtral", 0)), [[3, 4]], PAD)
    with pytest.raises(ValueError, match=r"^layers: 9 is no MoE layer of this model; they are \[0, 1, 2, 3\]"):
        released_metrics_of_tokens(olmoe, [[3, 4]], PAD, layers=[9])
    with pytest.raises(ValueError, match=r"^model.dtype: in this precision layer 1 is not finite"):
        released_metrics_of_tokens(prepare(build("deepseek_v2", 0, torch.float64)), [[3, 4], [3]], PAD)
    with pytest.raises(ValueError, match=r"^texts: all have fewer than 4 tokens"):
        released_metrics_of_tokens(qwen, [[3, 4, 5]], PAD)
