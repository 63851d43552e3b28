"""The corpus: text sources become documents with a domain, documents become token sequences, positions are sampled."""

from __future__ import annotations

from audit.corpus.positions import eligible_positions, sample_positions
from audit.corpus.sequences import Corpus, DocumentInfo, TokenSequence, build_corpus
from audit.corpus.sources import read_documents

__all__ = [
    "Corpus",
    "DocumentInfo",
    "TokenSequence",
    "build_corpus",
    "eligible_positions",
    "read_documents",
    "sample_positions",
]
