"""An interpolated Kneser-Ney bigram model: what counting pairs of tokens predicts, the demo model's bar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_USUAL_DISCOUNT = 0.75  # text from templates may have no rare events: the estimate is then 0, which smooths nothing


class KneserNeyBigram:
    """P(w | v) = max(c(v w) - D, 0) / c(v) + D N1+(v .) / c(v) * P1(w), with
    P1(w) = max(N1+(. w) - D1, 0) / N1+(. .) + D1 |{w: N1+(. w) > 0}| / N1+(. .) / V

    c counts occurrences, N1+ distinct neighbours. After a token never seen as a context P(w | v) = P1(w). Each level
    has its own discount n1 / (n1 + 2 n2), n1 and n2 being how many of its counts are 1 and 2, or 0.75 where none is 1.
    Source: Kneser and Ney (1995) as interpolated by Chen and Goodman, "An empirical study of smoothing techniques for
    language modeling" (1998).
    """

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Count the pairs of neighbours within each row of token ids in [0, vocabulary)."""
        counts_VV = np.zeros((vocabulary, vocabulary), dtype=np.int64)
        for row in rows:
            np.add.at(counts_VV, (np.asarray(row[:-1], dtype=np.int64), np.asarray(row[1:], dtype=np.int64)), 1)
        continuations_V = (counts_VV > 0).sum(0)
        pairs = continuations_V.sum()
        unigram_discount = _discount(continuations_V)
        unigram_V = np.maximum(continuations_V - unigram_discount, 0) / pairs
        unigram_V += unigram_discount * (continuations_V > 0).sum() / pairs / vocabulary

        discount = _discount(counts_VV)
        contexts_V = counts_VV.sum(1)
        reserved_V = np.where(contexts_V > 0, discount * (counts_VV > 0).sum(1), 1)
        total_V = np.maximum(contexts_V, 1)
        self.probabilities_VV: NDArray[np.float64] = np.maximum(counts_VV - discount, 0) / total_V[:, None]
        self.probabilities_VV += (reserved_V / total_V)[:, None] * unigram_V

    def losses(self, row: Sequence[int]) -> NDArray[np.float64]:
        """Negative log probability of every token of the row after the first, in nats, shape [len(row) - 1]."""
        ids = np.asarray(row, dtype=np.int64)
        losses: NDArray[np.float64] = -np.log(self.probabilities_VV[ids[:-1], ids[1:]])
        return losses


def _discount(counts: NDArray[np.int64]) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else _USUAL_DISCOUNT
