"""A random OLMoE of a few thousand weights with a tokenizer of bytes, as a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast


def write_tiny_olmoe(folder: Path, *, layers: int, experts: int, top_k: int) -> None:
    """The same weights every time."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, num_experts=experts, num_experts_per_tok=top_k, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=tokenizer.id_to_token(0))
    fast.save_pretrained(folder)
