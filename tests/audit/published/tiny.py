"""Tiny random checkpoints with the layers, experts and routing of the three published models.

Same class, layer count, number of experts, top-k and shared experts; every width is tiny. The tokenizer is the demo's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import draw_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from audit.demo import CHECKPOINT
from audit.published.figures import model_facts

_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OWN_WIDTHS: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    "deepseek_v2": {
        "moe_intermediate_size": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
# What decides layers, experts and routing, as far as a family has it.
STRUCTURE = (
    "num_hidden_layers",
    "num_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "topk_method",
    "n_group",
)


def tiny_config(model: str) -> Any:
    """The configuration of the published ``model`` with tiny widths."""
    facts = model_facts()[model]
    family = facts["model_type"]["value"]
    structure = {name: facts[name]["value"] for name in STRUCTURE if name in facts}
    if family == "deepseek_v2":
        structure["topk_group"] = 1
    config = CONFIG_MAPPING[family](**{**_WIDTHS, **_OWN_WIDTHS[family], **structure})
    config._experts_implementation = config._attn_implementation = "eager"
    return config


def tiny_model(model: str, seed: int = 0, dtype: torch.dtype = torch.float32, sd: float = 0.15) -> Any:
    """A random causal language model of that configuration, weights normal with ``sd``."""
    module = AutoModelForCausalLM.from_config(tiny_config(model))
    draw_weights(module, seed, sd)
    return module.to(dtype).eval()


def tiny_checkpoint(model: str, folder: Path, seed: int = 0) -> Path:
    """Write the model and the demo's tokenizer to ``folder``: a checkpoint that ``model.source`` can name."""
    tiny_model(model, seed).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder
