"""The benchmark model: OLMoE's shape (16 layers, 64 experts, top-8) with narrow layers and random weights."""

from __future__ import annotations

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


def olmoe_shaped(sd: float | None = None, seed: int = 0) -> OlmoeForCausalLM:
    """d 256 in 4 heads of 64, expert width 128, vocabulary 8192, float32.

    ``sd``: standard deviation of all weight matrices ("wide"); None is transformers' own initialisation, under
    which effects are tiny.
    """
    config = OlmoeConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=8192,
        max_position_embeddings=4096,
    )
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(config).eval()
    if sd is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * sd)
    return model
