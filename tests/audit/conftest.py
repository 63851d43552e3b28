"""Tokenizers small enough to train in a test, and a way to write a corpus and read it back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TokenizerFactory = Callable[[str], PreTrainedTokenizerFast]

_TRAINING_TEXT = ["The cat sat on the mat. It was warm! Was it? The dog ran home, and the cat slept."] * 20


@pytest.fixture(scope="module", autouse=True)
def _without_ray(no_ray: None) -> None:
    """Nothing here uses it, and an idle one takes a twentieth of the cores."""


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerFactory:
    """A byte-level BPE tokenizer that puts its special tokens as the template says, for example ``<s> $A``."""

    def make(template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=16
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: TokenizerFactory) -> PreTrainedTokenizerFast:
    """One that starts every text with ``<s>``."""
    return make_tokenizer("<s> $A")
