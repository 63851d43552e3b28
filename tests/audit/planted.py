"""A tiny OLMoE whose weights are written by hand, so that it is known which expert matters.

Content token v is followed by ``rule[v]``. The residual stream has a half that says which token is read and a half that
says which one comes next; the head reads the second. In every layer one *planted* expert carries the answer: unit v of
it recognises token v and writes the direction of its successor. All other experts write small noise. The planted expert
is among the active ones for most tokens, with partners that differ and, for some, with the smaller routing weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from families import config_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from audit.corpus import TokenSequence

CONTENT = 28  # tokens FIRST to FIRST + CONTENT - 1
FIRST = 3  # below stand the special tokens
HIDDEN = 2 * (FIRST + CONTENT + 1)
LAYERS, EXPERTS, TOP_K = 4, 8, 3
ROUTED = 0.8  # share of the content tokens that the planted expert of a layer is active for


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """The model, the planted expert of each layer, and token sequences that follow the rule.

    ``routed``, layer: the tokens its planted expert is active for, but for what attention adds to the router's input.
    """

    module: Any
    experts: dict[int, int]
    sequences: list[TokenSequence]
    routed: dict[int, frozenset[int]]


def planted_model(
    seed: int, *, documents: int = 12, length: int = 24, surprise: float = 0.15, dtype: torch.dtype = torch.float32
) -> Planted:
    """A model and its texts; every token is a random one, against the rule, with probability ``surprise``."""
    rng = np.random.default_rng(seed)
    rule = np.arange(FIRST + CONTENT)
    content = rng.permutation(np.arange(FIRST, FIRST + CONTENT))
    rule[content] = np.roll(content, -1)  # one cycle
    planted = {layer: int(rng.integers(EXPERTS)) for layer in range(LAYERS)}
    routed = {
        layer: frozenset(rng.choice(content, round(ROUTED * CONTENT), replace=False).tolist()) for layer in planted
    }
    module = AutoModelForCausalLM.from_config(_config())
    with torch.no_grad():
        _write(module, rule, planted, routed, np.random.default_rng([seed, 1]))
    texts = [_text(rule, number, length, surprise, rng) for number in range(documents)]
    return Planted(module.to(dtype).eval(), planted, texts, routed)


def _config() -> Any:
    return config_of(
        "olmoe",
        experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        vocab_size=FIRST + CONTENT,
        intermediate_size=HIDDEN // 2,
        tie_word_embeddings=False,
    )


def _write(
    module: Any,
    rule: np.ndarray[Any, Any],
    planted: dict[int, int],
    routed: dict[int, frozenset[int]],
    rng: np.random.Generator,
) -> None:
    half, tokens = HIDDEN // 2, torch.arange(FIRST + CONTENT)
    successor = torch.from_numpy(rule)

    def noise(parameter: Tensor, sd: float) -> None:
        parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * sd))

    noise(module.model.embed_tokens.weight, 0.02)
    module.model.embed_tokens.weight[tokens, tokens] += 2.0
    noise(module.lm_head.weight, 0.02)
    module.lm_head.weight[tokens, half + tokens] += 2.2
    for layer, block in enumerate(module.model.layers):
        attention, experts, best = block.self_attn, block.mlp.experts, planted[layer]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            noise(projection.weight, 0.15)
        noise(attention.o_proj.weight, 0.005)
        noise(experts.gate_up_proj, 0.05)
        noise(experts.down_proj, 0.02)
        # Unit v: silu(gate) * up is large for token v alone, whose entry of the normalised stream is about 6.
        gate, up = experts.gate_up_proj[best].chunk(2)
        gate[tokens, tokens] += 0.7
        up[tokens, tokens] += 0.35
        experts.down_proj[best][half + successor, tokens] += 0.08
        # Routers read the token. The planted expert stands first, second or third for the tokens it is for.
        weight = block.mlp.gate.weight
        noise(weight, 0.02)
        logits = torch.from_numpy(rng.normal(size=(EXPERTS, FIRST + CONTENT)))
        others = torch.cat([logits[:best], logits[best + 1 :]]).sort(0, descending=True).values
        for token in range(FIRST + CONTENT):
            rank = int(rng.integers(TOP_K))  # how many others weigh more
            around = [others[0, token] + 0.5, *others[:TOP_K, token]]
            inside = (around[rank] + around[rank + 1]) / 2
            logits[best, token] = inside if token in routed[layer] else others[-1, token] - 1.0
        weight[:, : FIRST + CONTENT] += logits.to(weight.dtype) / 6.0


def _text(
    rule: np.ndarray[Any, Any], number: int, length: int, surprise: float, rng: np.random.Generator
) -> TokenSequence:
    ids = [int(rng.integers(FIRST, FIRST + CONTENT))]
    while len(ids) < length:
        ids.append(int(rng.integers(FIRST, FIRST + CONTENT)) if rng.random() < surprise else int(rule[ids[-1]]))
    return TokenSequence(
        index=number,
        document=number,
        domain="planted",
        token_ids=np.array(ids),
        sentence=np.zeros(length, dtype=np.int32),
        special=np.zeros(length, dtype=np.bool_),
    )
