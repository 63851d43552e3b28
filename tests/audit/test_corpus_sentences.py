"""Sentences against texts whose sentences are plain to see."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from audit.corpus.sentences import sentence_of_tokens, sentence_starts


def cut(text: str) -> list[str]:
    starts = sentence_starts(text)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", [""]),
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ("It is 3.14, e.g. this. Then more.", ["It is 3.14, e.g. this. ", "Then more."]),
        ('He said "No." Then "Yes!"', ['He said "No." ', 'Then "Yes!"']),
        ("Wait... What?! Yes. ", ["Wait... ", "What?! ", "Yes. "]),
        ("a heading\n\nand text\nin lines", ["a heading\n\n", "and text\nin lines"]),
        ("First.\n \t\nsecond", ["First.\n \t\n", "second"]),
        ("Dr. Smith", ["Dr. ", "Smith"]),
    ],
)
def test_sentences_by_the_rule(text: str, sentences: list[str]) -> None:
    assert cut(text) == sentences


def test_a_token_belongs_to_the_sentence_of_its_last_character() -> None:
    text = "A b. C d.\n\nE"
    # <s>, "A", " b", ".", " C" (with the space before it), " d", ".\n\n", "E", </s>
    offsets = [(0, 0), (0, 1), (1, 3), (3, 4), (4, 6), (6, 8), (8, 11), (11, 12), (0, 0)]
    assert sentence_of_tokens(text, offsets).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_every_token_of_a_real_tokenizer_lies_where_its_characters_do(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = ["The cat é sat. ", "Was it 3.14? ", "日本 ran home!\n\n", "the end"]
    encoding = tokenizer("".join(sentences), return_offsets_mapping=True)
    of_tokens = sentence_of_tokens("".join(sentences), encoding["offset_mapping"])
    ids = np.array(encoding["input_ids"])
    texts = [tokenizer.decode(ids[of_tokens == n], skip_special_tokens=True).strip() for n in range(len(sentences))]
    assert texts == [sentence.strip() for sentence in sentences]
