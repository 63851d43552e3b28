"""Token sequences: they reassemble to the tokenised documents, and nothing is lost without being counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from audit.config import AuditConfig, ConfigError
from audit.corpus import Corpus, build_corpus

TokenizerFactory = Callable[[str], PreTrainedTokenizerFast]

BOS, EOS = 0, 1
TEXTS = [
    "The cat sat on the mat. It was warm! Was it? " * 3,
    "日本 é ünïcode 🎉 and tabs\t\n\nthen. more text",
    "The dog ran home, and the cat slept.",
    "One two.",
]


def build(folder: Path, texts: list[str], tokenizer: Any, limit: int | None = None, **settings: Any) -> Corpus:
    path = folder / "texts.jsonl"
    rows = [{"text": text, "topic": "even" if n % 2 == 0 else "odd"} for n, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "jsonl", "path": path.name, "domain_field": "topic"}
    config = AuditConfig.parse({"corpus": {"sources": [source], **settings}}, folder)
    return build_corpus(config.corpus, tokenizer, limit, folder)


@pytest.mark.parametrize("max_tokens", [5, 8, 17, 4096])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_sequences_reassemble_to_the_document(
    tmp_path: Path, make_tokenizer: TokenizerFactory, template: str, max_tokens: int
) -> None:
    tokenizer = make_tokenizer(template)
    corpus = build(tmp_path, TEXTS, tokenizer, max_tokens=max_tokens)
    front = template.startswith("<s>")
    for number, text in enumerate(TEXTS):
        own = [sequence for sequence in corpus.sequences if sequence.document == number]
        # Reference: the tokenizer's library itself, without special tokens.
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        expected += [EOS] if template.endswith("</s>") else []
        assert np.concatenate([sequence.token_ids[front:] for sequence in own]).tolist() == expected
        assert all(2 + front <= len(sequence) <= max_tokens for sequence in own)
        lengths = [len(sequence) for sequence in own]
        assert max(lengths) - min(lengths) <= 1 + template.endswith("</s>")
        if front:
            assert {int(sequence.token_ids[0]) for sequence in own} == {BOS}
    assert [sequence.index for sequence in corpus.sequences] == list(range(len(corpus.sequences)))
    assert corpus.counts.get("split", 0) == sum(
        sum(sequence.document == n for sequence in corpus.sequences) > 1 for n in range(len(TEXTS))
    )


def test_no_sequence_crosses_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["aaaa" * 9, "bbbb" * 7, "cccc" * 5]
    corpus = build(tmp_path, texts, tokenizer, max_tokens=10)
    for sequence in corpus.sequences:
        letters = set(tokenizer.decode(sequence.token_ids, skip_special_tokens=True))
        assert letters == {"abc"[sequence.document]}
        assert sequence.domain == corpus.documents[sequence.document].domain == ["even", "odd"][sequence.document % 2]


def test_special_tokens_are_marked_wherever_they_stand(tmp_path: Path, make_tokenizer: TokenizerFactory) -> None:
    corpus = build(tmp_path, ["the cat</s> sat on the mat"], make_tokenizer("<s> $A </s>"), max_tokens=6)
    assert len(corpus.sequences) > 1
    for sequence in corpus.sequences:
        assert sequence.special.tolist() == [token in (BOS, EOS) for token in sequence.token_ids.tolist()]
    assert sum(int(s.special.sum()) for s in corpus.sequences) == len(corpus.sequences) + 2


def test_sentences_run_on_through_the_pieces_of_a_document(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = ["The cat sat. ", "The dog ran home! ", "Was it warm? ", "It was."]
    corpus = build(tmp_path, ["".join(sentences)], tokenizer, max_tokens=7)
    assert len(corpus.sequences) > 2
    ids = np.concatenate([sequence.token_ids[1:] for sequence in corpus.sequences])
    of_token = np.concatenate([sequence.sentence[1:] for sequence in corpus.sequences])
    texts = [tokenizer.decode(ids[of_token == n]).strip() for n in range(4)]
    assert texts == [sentence.strip() for sentence in sentences]
    assert all(sequence.sentence[0] == sequence.sentence[1] for sequence in corpus.sequences)


def test_truncation_keeps_the_start_and_counts_the_rest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build(tmp_path, TEXTS, tokenizer, max_tokens=12, long_documents="truncate")
    # Reference: the tokenizer's own truncation.
    expected = [tokenizer(text, truncation=True, max_length=12)["input_ids"] for text in TEXTS]
    assert [sequence.token_ids.tolist() for sequence in corpus.sequences] == expected
    whole = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert corpus.counts["truncated"] == sum(length > 12 for length in whole)
    assert corpus.counts["truncated_tokens"] == sum(max(length - 12, 0) for length in whole)


def test_documents_without_text_to_predict_are_counted_and_said(
    tmp_path: Path, make_tokenizer: TokenizerFactory
) -> None:
    class Silent:
        """A tokenizer that has no token for a text that is one full stop."""

        is_fast = False
        all_special_ids = (BOS,)

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            ids = [[BOS] if text == "." else [BOS, *range(5, 5 + len(text))] for text in texts]
            return {"input_ids": ids, "special_tokens_mask": [[1] + [0] * (len(row) - 1) for row in ids]}

    corpus = build(tmp_path, [".", "a", "ab", "."], Silent())
    assert [(s.token_ids.tolist(), s.document) for s in corpus.sequences] == [([BOS, 5, 6], 0)]
    assert [document.domain for document in corpus.documents] == ["even"]
    assert corpus.counts["no_token"] == 2
    assert corpus.counts["one_token"] == 1
    said = corpus.summary()
    assert "1 documents, 1 sequences, 3 tokens" in said
    assert "2 left out for having no token of text" in said
    assert "1 taken as one sentence" in said
    with pytest.raises(ConfigError, match=r"corpus\.sources: none of the 2 documents has two tokens of text"):
        build(tmp_path, ["a", "."], Silent())


def test_the_digest_changes_with_whatever_the_model_reads(tmp_path: Path, make_tokenizer: TokenizerFactory) -> None:
    tokenizer = make_tokenizer("$A")
    same = [build(tmp_path, TEXTS, tokenizer).digest for _ in range(2)]
    other = [
        build(tmp_path, [*TEXTS[:-1], "One two!"], tokenizer).digest,
        build(tmp_path, TEXTS[::-1], tokenizer).digest,
        build(tmp_path, TEXTS, tokenizer, max_tokens=9).digest,
        build(tmp_path, TEXTS, make_tokenizer("<s> $A")).digest,
    ]
    assert same[0] == same[1]
    assert len({same[0], *other}) == 5


def test_the_split_is_disjoint_by_document_and_proportional_by_domain(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = build(tmp_path, [f"{n} " * 20 for n in range(40)], tokenizer, max_tokens=16)
    calibration, audited = corpus.split(0.2, None, seed=1)
    set_aside, rest = {s.document for s in calibration}, {s.document for s in audited}
    assert (len(set_aside), len(rest), set_aside & rest) == (8, 32, set())
    assert sorted(s.index for s in [*calibration, *audited]) == list(range(len(corpus.sequences)))
    assert sorted(document % 2 for document in set_aside) == [0] * 4 + [1] * 4
    assert {s.document for s in corpus.split(0.2, None, seed=1)[0]} == set_aside
    assert {s.document for s in corpus.split(0.2, None, seed=2)[0]} != set_aside
    assert len({s.document for s in corpus.split(0.2, 3, seed=1)[0]}) == 3
    assert corpus.split(0.0, None, seed=1) == ([], corpus.sequences)


def test_the_split_gives_every_document_the_same_chance(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build(tmp_path, [f"text {n}" for n in range(10)], tokenizer)
    times = np.zeros(10)
    for seed in range(400):
        times[[s.document for s in corpus.split(0.3, None, seed)[0]]] += 1
    # 120 of 400 expected; 4 standard errors of a binomial are 37.
    assert np.abs(times - 120).max() < 37


@pytest.mark.parametrize(
    ("documents", "told"),
    [(None, r"calibration\.share: 0\.9 .* 2 of 2"), (5, r"calibration\.documents: 5 .* at most 1")],
)
def test_a_split_that_leaves_nothing_to_audit_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, documents: int | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        build(tmp_path, TEXTS[:2], tokenizer).split(0.9, documents, seed=0)


def test_limits_and_a_missing_tokenizer_are_told(tmp_path: Path, make_tokenizer: TokenizerFactory) -> None:
    tokenizer = make_tokenizer("<s> $A </s>")
    with pytest.raises(ConfigError, match=r"corpus\.max_tokens: 600 .* use at most 512"):
        build(tmp_path, TEXTS, tokenizer, limit=512, max_tokens=600)
    with pytest.raises(ConfigError, match=r"corpus\.max_tokens: 4 .* use at least 5"):
        build(tmp_path, TEXTS, tokenizer, max_tokens=4)
    with pytest.raises(ConfigError, match=r"model\.source: .* no tokenizer"):
        build(tmp_path, TEXTS, None)
