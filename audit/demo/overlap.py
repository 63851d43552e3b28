"""What texts have in common: the normal form of a text, and the fingerprint of all that training has read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RUN = 16  # words of one hashed run
STRIDE = 8  # words between the starts of two stored runs
ALWAYS_FOUND = RUN + STRIDE - 1  # a common run this long always contains a stored one

# ASCII only: what counts as a letter beyond ASCII differs between Python versions, and the split must not.
_WORD = re.compile(r"[A-Za-z0-9_]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so multiplication by its powers loses nothing modulo 2**64


def words(text: str) -> list[str]:
    """The text without layout and punctuation: its ASCII words in order, case kept."""
    return _WORD.findall(text)


def text_hash(text: str) -> str:
    """SHA-256 (hexadecimal) of the normalised text: equal for texts that differ in layout or punctuation only."""
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SeenText:
    """Hashes of the runs of 16 words that start at every 8th word of the training documents.

    A text that shares 23 consecutive words with a training document is always recognised, one that shares 16 to 22
    sometimes, one that shares fewer never (but for a 64-bit collision). Winnowing after Schleimer, Wilkerson and
    Aiken, "Winnowing: local algorithms for document fingerprinting" (2003), with a fixed stride on the stored side.
    """

    hashes: NDArray[np.uint64]  # sorted, unique

    @classmethod
    def of(cls, texts: Iterable[str]) -> SeenText:
        """The fingerprint of the texts; those shorter than 16 words leave no trace."""
        runs = [_run_hashes(words(text))[::STRIDE] for text in texts]
        return cls(np.unique(np.concatenate([np.empty(0, np.uint64), *runs])))

    @classmethod
    def load(cls, path: Path) -> SeenText:
        """Read what ``save`` wrote."""
        return cls(np.load(path, allow_pickle=False))

    def save(self, path: Path) -> None:
        """Write the hashes as a NumPy file, 8 bytes each."""
        np.save(path, self.hashes, allow_pickle=False)

    def contains_part_of(self, text: str) -> bool:
        """Whether any run of 16 words of the text is a stored one."""
        runs = _run_hashes(words(text))
        after = np.searchsorted(self.hashes, runs, side="right")
        return bool((np.searchsorted(self.hashes, runs, side="left") < after).any())


def _run_hashes(tokens: list[str]) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of the RUN words starting at each position, shape [max(0, words - RUN + 1)]."""
    count = max(0, len(tokens) - RUN + 1)
    word_hashes = np.array([_word_hash(token) for token in tokens], dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN):  # unsigned array arithmetic wraps around, which is the modulus wanted
        total = total * np.uint64(_BASE) + word_hashes[offset : offset + count]
    return total


@cache
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
