"""Sentences of a text by a simple rule, and the sentence of every token.

A sentence ends after ``.``, ``!`` or ``?`` (with closing quotes and brackets) before white space, unless a lower-case
letter follows, and at a blank line. No dictionary: ``Dr. Smith`` is cut in two, ``e.g. this`` and ``3.14`` are not,
and scripts without white space between sentences have one per paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_END = re.compile(r"""[.!?]+["'”’»)\]}]*\s+|\n[^\S\n]*\n\s*""")


def sentence_starts(text: str) -> list[int]:
    """The character at which each sentence starts, ascending; the first is 0, and a text has at least one."""
    starts = [0]
    for end in _END.finditer(text):
        paragraph = end.group().count("\n") > 1
        if end.end() < len(text) and (paragraph or not text[end.end()].islower()):
            starts.append(end.end())
    return starts


def sentence_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """The number of the sentence of every token, [T], from the tokens' character spans (start, end) in the text.

    A token belongs to the sentence of its last character: a tokenizer may count the space before a word as the word's.
    A token without characters (a special one) belongs to the sentence before it.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    sentence = np.searchsorted(sentence_starts(text), spans[:, 1] - 1, side="right") - 1
    sentence[spans[:, 0] == spans[:, 1]] = 0
    return np.maximum.accumulate(sentence).astype(np.int32)
