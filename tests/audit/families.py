"""Tiny random models of every family that tests run on, with weights wide enough that routing is not degenerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from audit.corpus import TokenSequence
from audit.engine.validate import validate
from audit.models import MoEModel, prepare

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_SHARED_AFTER_ONE: dict[str, Any] = {"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16}
_ONE_GROUP: dict[str, Any] = {"n_group": 1, "topk_group": 1}

# The families that the sweep measures.
SWEEP: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "deepseek_v2": {
        **_MLA,
        **_ONE_GROUP,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "topk_method": "greedy",
    },
    "mixtral": {},
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **_MLA,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "glm4_moe": {**_SHARED_AFTER_ONE, **_ONE_GROUP},
    "phimoe": {},
    "granitemoe": {"residual_multiplier": 0.7, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "granitemoeshared": {"shared_intermediate_size": 32, "residual_multiplier": 0.7},
    "ernie4_5_moe": {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "dots1": {**_SHARED_AFTER_ONE, **_ONE_GROUP},
    "flex_olmo": {},
    "minimax_m2": {"head_dim": 16},
    "afmoe": {
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 16,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
    },
    "solar_open": {"n_shared_experts": 1, "head_dim": 16, **_ONE_GROUP},
    "exaone_moe": {
        **_SHARED_AFTER_ONE,
        **_ONE_GROUP,
        "num_shared_experts": 1,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "hunyuan_v1_moe": {"head_dim": 16},
}
# Families whose state runs along the sequence by other means than attention to earlier keys.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "minimax": {"head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
    },
}
WITH_SHARED = frozenset(
    {
        "qwen2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "granitemoeshared",
        "ernie4_5_moe",
        "dots1",
        "afmoe",
        "solar_open",
        "exaone_moe",
        "hunyuan_v1_moe",
    }
)


def config_of(family: str, *, experts: int = 8, top_k: int = 2, **options: Any) -> Any:
    """The family's configuration at test size; ``options`` override single fields."""
    counts = {
        "num_experts": experts,
        "num_local_experts": experts,
        "n_routed_experts": experts,
        "moe_num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_topk": top_k,
        "moe_k": top_k,
    }
    config = CONFIG_MAPPING[family](**{**_COMMON, **counts, **(SWEEP | RECURRENT).get(family, {}), **options})
    config._experts_implementation = config._attn_implementation = "eager"
    return config


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, sd: float = 0.15, **options: Any) -> Any:
    """A random causal language model: weights and router biases normal with ``sd``, norms around 1."""
    module = AutoModelForCausalLM.from_config(config_of(family, **options))
    draw_weights(module, seed, sd)
    return module.to(dtype).eval()


@torch.no_grad()
def draw_weights(module: torch.nn.Module, seed: int, sd: float = 0.15) -> None:
    """Every parameter normal with ``sd``, norms around 1, and the routers' correction biases non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * sd
        parameter.copy_(noise + (1.0 if parameter.dim() == 1 and "norm" in name else 0.0))
    for name, buffer in module.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * sd)


class Float64Throughout(TorchFunctionMode):
    """Within this context nothing rounds float64 to float32, as the norms and routers of most families do inside.

    What is left of the distance between two ways to compute one thing is then rounding in the sixteenth digit.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.Tensor.type):
                args = (args[0], *(torch.float64 if a is torch.float32 else a for a in args[1:]))
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@cache
def ready(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> MoEModel:
    """The family's model in memory, validated; made once, so a test must leave it as it was."""
    return validate(prepare(build(family, seed, dtype)))


def texts(lengths: Sequence[int], seed: int = 0, vocabulary: int = 128, first: int = 0) -> list[TokenSequence]:
    """Random sequences of the given lengths, numbered from ``first``; document numbers differ from sequence numbers."""
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(
            index=first + i,
            document=10 * (first + i),
            domain="text",
            token_ids=rng.integers(3, vocabulary, n),
            sentence=np.arange(n, dtype=np.int32) // 4,
            special=np.zeros(n, dtype=np.bool_),
        )
        for i, n in enumerate(lengths)
    ]
