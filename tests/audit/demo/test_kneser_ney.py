"""The Kneser-Ney bigram model against figures worked by hand and a plain loop over dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from audit.demo.kneser_ney import KneserNeyBigram


def test_a_tiny_corpus_worked_by_hand() -> None:
    # Row 0 1 0 1 2: pairs 01 twice, 10 once, 12 once. D = 2 / (2 + 2 * 1) = 1/2.
    # Different predecessors: of 0 one, of 1 one, of 2 one; so D1 = 3 / (3 + 0) = 1 and P1 is uniform over V = 4.
    model = KneserNeyBigram([[0, 1, 0, 1, 2]], vocabulary=4)
    expected = [
        [1 / 16, 3 / 4 + 1 / 16, 1 / 16, 1 / 16],  # after 0: (2 - 1/2) / 2, and 1/2 * 1 / 2 for P1
        [3 / 8, 1 / 8, 3 / 8, 1 / 8],  # after 1: (1 - 1/2) / 2 twice, and 1/2 * 2 / 2 for P1
        [1 / 4] * 4,  # 2 and 3 were never contexts
        [1 / 4] * 4,
    ]
    np.testing.assert_allclose(model.probabilities_VV, expected, rtol=1e-14)
    np.testing.assert_allclose(model.losses([3, 0, 1]), [math.log(4), -math.log(13 / 16)], rtol=1e-14)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_plain_loop(seed: int) -> None:
    rng, size = Random(seed), 12
    rows = [[min(rng.randrange(size), rng.randrange(size)) for _ in range(rng.randrange(1, 30))] for _ in range(8)]
    pairs = Counter((a, b) for row in rows for a, b in pairwise(row))
    predecessors = Counter(b for _, b in pairs)

    def discount(counts: list[int]) -> float:
        return counts.count(1) / (counts.count(1) + 2 * counts.count(2)) if 1 in counts else 0.75

    d, d1 = discount(list(pairs.values())), discount(list(predecessors.values()))
    model = KneserNeyBigram(rows, size)
    for v in range(size):
        context = sum(count for (a, _), count in pairs.items() if a == v)
        followers = sum(1 for a, _ in pairs if a == v)
        for w in range(size):
            unigram = (max(predecessors[w] - d1, 0) + d1 * len(predecessors) / size) / len(pairs)
            p = (max(pairs[v, w] - d, 0) + d * followers * unigram) / context if context else unigram
            assert model.probabilities_VV[v, w] == pytest.approx(p, rel=1e-12)
    np.testing.assert_allclose(model.probabilities_VV.sum(1), 1, rtol=1e-12)
    assert (model.probabilities_VV > 0).all()


def test_text_without_rare_pairs_still_leaves_room_for_unseen_ones() -> None:
    model = KneserNeyBigram([[0, 1] * 10], vocabulary=3)  # every pair occurs 9 times or more
    assert model.probabilities_VV[0, 2] > 0
    np.testing.assert_allclose(model.probabilities_VV.sum(1), 1, rtol=1e-12)
