"""Documents become token sequences: without padding, never across documents, every token placed in its sentence.

A document is tokenised once, as the tokenizer does by default, special tokens included. One longer than the limit is
cut into pieces of equal length (to one token) rather than full ones and a rest: no piece is left with little context.
Special tokens that the tokenizer puts in front are put in front of *every* piece, because models are trained on windows
that start with them and send much attention there; those it puts at the end close only the last piece, because they
say that the text is over. Truncation keeps the first piece that fits, without closing tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.config import ConfigError, CorpusConfig, check_length
from audit.corpus.sentences import sentence_of_tokens
from audit.corpus.sources import read_documents
from audit.documents import Document

_SMALLEST_PIECE = 3  # tokens of text that a sequence must have room for: then no piece has fewer than two
_BATCH = 256  # documents tokenised at once
_STREAM = 1  # keeps the split's draws apart from those of positions, which have the same seed


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A stretch of one document that the model reads at once."""

    index: int  # of the sequence in the corpus
    document: int  # in Corpus.documents
    domain: str
    token_ids: NDArray[np.int64]  # [T]
    sentence: NDArray[np.int32]  # [T], number of the sentence in the document
    special: NDArray[np.bool_]  # [T], a special token of the tokenizer, whether it was added or stood in the text

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """What is known of a document without its text."""

    name: str
    domain: str
    sha256: str  # of the text in UTF-8


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Documents and their sequences; ``counts`` tells what was read, left out and cut, ``digest`` identifies it all."""

    documents: list[DocumentInfo]
    sequences: list[TokenSequence]
    digest: str  # SHA-256 over documents, limits and token ids, hence over whatever the tokenizer does
    counts: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, special ones included."""
        return sum(map(len, self.sequences))

    @property
    def domains(self) -> list[str]:
        """The domains in the order of their first document."""
        return list(dict.fromkeys(document.domain for document in self.documents))

    def summary(self) -> str:
        """The corpus in a line for people, with everything that was left out, cut or repeated."""
        size = f"{len(self.documents)} documents, {len(self.sequences)} sequences, {self.tokens} tokens"
        return "; ".join(
            [size, *(said.format(self.counts[key]) for key, said in _SAID.items() if self.counts.get(key))]
        )

    def split(self, share: float, documents: int | None, seed: int) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """The sequences of the calibration documents and those of the audited ones.

        ``documents``, or else the share of the documents (rounded, at least one unless the share is 0), are drawn at
        random and set aside, from every domain in proportion. Raises ConfigError if none would be left to audit.
        """
        total = len(self.documents)
        wanted = documents if documents is not None else max(round(share * total), int(share > 0))
        if wanted >= total:
            given = f"documents: {documents}" if documents is not None else f"share: {share}"
            raise ConfigError(
                f"calibration.{given} sets aside {wanted} of {total} documents and leaves none to audit; "
                f"use at most {total - 1} documents, or a larger corpus"
            )
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
        key = np.empty(total)
        of_document = np.array([document.domain for document in self.documents])
        for domain in self.domains:
            members = np.flatnonzero(of_document == domain)
            # Equally spaced keys in random order: the documents below any bound are the same share of every domain.
            key[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
        chosen = set(np.argsort(key, kind="stable")[:wanted].tolist())
        return (
            [sequence for sequence in self.sequences if sequence.document in chosen],
            [sequence for sequence in self.sequences if sequence.document not in chosen],
        )


_SAID = {
    "read": "{} documents read",
    "too_short": "{} too short and left out",
    "demo_overlapping": "{} left out because the demo model was trained on part of them",
    "demo_shortened": "{} are the beginning of a longer demo text",
    "hidden_files": "{} hidden files left out",
    "other_files": "{} files of other kinds left out",
    "no_token": "{} left out for having no token of text",
    "one_token": "{} left out for having one token of text only",
    "duplicates": "{} have the text of an earlier one",
    "split": "{} split over several sequences",
    "truncated": "{} truncated",
    "truncated_tokens": "{} tokens cut off",
    "without_sentences": "{} taken as one sentence, because this tokenizer does not tell where tokens stand",
}


def build_corpus(config: CorpusConfig, tokenizer: Any, context_limit: int | None, folder: Path) -> Corpus:
    """Read the sources, whose paths are relative to the folder, and tokenise them with a transformers tokenizer.

    Raises ConfigError for what cannot be read, sequences longer than the model accepts (``context_limit``), a
    checkpoint without tokenizer, and a corpus without text.
    """
    check_length(config.max_tokens, context_limit)
    if tokenizer is None:
        raise ConfigError("model.source: this checkpoint has no tokenizer; name one that has, as the corpus is text")
    texts, counts = read_documents(config, folder)
    documents: list[DocumentInfo] = []
    sequences: list[TokenSequence] = []
    for document, encoded in zip(texts, _encode(tokenizer, texts), strict=True):
        if encoded.text_tokens < 2:
            counts["one_token" if encoded.text_tokens else "no_token"] += 1
            continue
        counts["without_sentences"] += not encoded.has_sentences
        for piece in _pieces(encoded, config, counts):
            ids, sentence, special = encoded.token_ids[piece], encoded.sentence[piece], encoded.special[piece].copy()
            front = piece < encoded.front
            # In front of a later piece stands a token of the document's start: it belongs to the piece's own sentence.
            sentence = np.where(front, sentence[len(piece[front])], sentence)
            sequences.append(TokenSequence(len(sequences), len(documents), document.domain, ids, sentence, special))
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest()
        documents.append(DocumentInfo(document.name, document.domain, digest))
    if not documents:
        read = counts["read"]
        raise ConfigError(f"corpus.sources: none of the {read} documents has two tokens of text; use longer texts")
    return Corpus(documents, sequences, _digest(config, documents, sequences), dict(counts))


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A whole tokenised document: ``front`` special tokens, then ``text_tokens`` tokens of text, then closing ones."""

    token_ids: NDArray[np.int64]
    sentence: NDArray[np.int32]
    special: NDArray[np.bool_]
    front: int
    text_tokens: int
    has_sentences: bool


def _encode(tokenizer: Any, documents: Sequence[Document]) -> Iterator[_Encoded]:
    special_ids = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        # Only tokenizers of the Rust library tell offsets. verbose: long documents are cut here, so no warning is due.
        encoding = tokenizer(
            [document.text for document in batch],
            return_offsets_mapping=tokenizer.is_fast,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        for number, document in enumerate(batch):
            ids = np.array(encoding["input_ids"][number], dtype=np.int64)
            text_at = np.flatnonzero(np.array(encoding["special_tokens_mask"][number]) == 0)
            sentence = (
                sentence_of_tokens(document.text, encoding["offset_mapping"][number])
                if tokenizer.is_fast
                else np.zeros(len(ids), dtype=np.int32)
            )
            front, end = (int(text_at[0]), int(text_at[-1]) + 1) if len(text_at) else (len(ids), len(ids))
            special = np.isin(ids, special_ids)
            special[:front] = special[end:] = True
            yield _Encoded(ids, sentence, special, front, end - front, bool(tokenizer.is_fast))


def _pieces(encoded: _Encoded, config: CorpusConfig, counts: Counter[str]) -> Iterator[NDArray[np.int64]]:
    """For each sequence of the document the numbers of its tokens in the document, the front tokens among them."""
    front = np.arange(encoded.front)
    text = np.arange(encoded.front, encoded.front + encoded.text_tokens)
    closing = np.arange(encoded.front + encoded.text_tokens, len(encoded.token_ids))
    room = config.max_tokens - len(front) - len(closing)
    if room < _SMALLEST_PIECE:
        added = len(front) + len(closing)
        raise ConfigError(
            f"corpus.max_tokens: {config.max_tokens} leaves no room beside the {added} special tokens that the "
            f"tokenizer adds; use at least {added + _SMALLEST_PIECE}"
        )
    if len(text) <= room:
        yield np.concatenate([front, text, closing])
    elif config.long_documents == "truncate":
        counts["truncated"] += 1
        counts["truncated_tokens"] += len(text) - room
        yield np.concatenate([front, text[:room]])
    else:
        counts["split"] += 1
        parts = np.array_split(text, -(-len(text) // room))
        for part in parts[:-1]:
            yield np.concatenate([front, part])
        yield np.concatenate([front, parts[-1], closing])


def _digest(config: CorpusConfig, documents: Sequence[DocumentInfo], sequences: Sequence[TokenSequence]) -> str:
    digest = hashlib.sha256(json.dumps([config.max_tokens, config.long_documents]).encode())
    for document in documents:
        digest.update(json.dumps([document.name, document.domain, document.sha256]).encode())
    for sequence in sequences:
        digest.update(json.dumps([sequence.document, len(sequence)]).encode())
        digest.update(sequence.token_ids.astype("<i8").tobytes())
    return digest.hexdigest()
