"""The packaged checkpoint: its size, its shape, and that it has learnt what its card says."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.demo import CHECKPOINT, DOMAINS
from audit.demo.evaluation import Evaluation, evaluate_checkpoint


@pytest.fixture(scope="module")
def sample() -> Evaluation:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate_checkpoint(CHECKPOINT, documents_per_domain=60)
    finally:
        torch.set_num_threads(threads)


def test_checkpoint_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sizes.keys() >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "seen_text.npy",
    }
    assert sum(sizes.values()) <= 10_000_000


def test_checkpoint_loads_as_any_other() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert model.dtype == torch.bfloat16
    config = model.config
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (6, 16, 4)
    assert config.vocab_size == len(tokenizer)
    assert tokenizer("def")["input_ids"][0] == tokenizer.bos_token_id == tokenizer.all_special_ids[0]


def test_it_predicts_better_than_the_bigram_by_the_cards_margin(sample: Evaluation) -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    for result in sample.domains:
        row = re.search(rf"^\| {result.domain} \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
        assert row is not None
        model_loss, bigram_loss, gain = map(float, row.groups())
        assert gain >= 0.5
        assert gain == pytest.approx(bigram_loss - model_loss, abs=0.0011)  # three rounded figures
        assert result.gain >= 0.5
        assert result.gain == pytest.approx(gain, abs=0.15)  # 60 documents of the domain's hundreds


def test_every_expert_is_used(sample: Evaluation) -> None:
    assert [result.domain for result in sample.domains] == list(DOMAINS)
    assert sample.shares_LE.shape == (6, 16)
    assert sample.shares_LE.sum(1) == pytest.approx(1)
    assert sample.shares_LE.min() >= 0.01
