"""Position samples: uniform over the eligible positions of a corpus, without replacement, a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from audit.config import ConfigError
from audit.corpus import TokenSequence, sample_positions


def sequence(index: int, special: list[int]) -> TokenSequence:
    return TokenSequence(
        index=index,
        document=index,
        domain="d",
        token_ids=np.arange(len(special)),
        sentence=np.zeros(len(special), dtype=np.int32),
        special=np.array(special, dtype=np.bool_),
    )


SEQUENCES = [
    sequence(0, [1, 0, 0, 0, 1, 0]),
    sequence(1, [0, 0]),
    sequence(2, [1]),
    sequence(3, [0, 0, 0, 1, 0]),
]


def positions(*arguments: object, **options: object) -> list[list[int]]:
    return [part.tolist() for part in sample_positions(SEQUENCES, *arguments, **options)]  # type: ignore[arg-type]


def test_all_positions_but_the_first_and_special_ones() -> None:
    assert positions(None, 0) == [[1, 2, 3, 5], [1], [], [1, 2, 4]]
    assert positions(None, 0, include_first=True) == [[1, 2, 3, 5], [0, 1], [], [0, 1, 2, 4]]
    assert positions(None, 0, include_special=True) == [[1, 2, 3, 4, 5], [1], [], [1, 2, 3, 4]]
    assert positions(None, 0, True, True) == [[0, 1, 2, 3, 4, 5], [0, 1], [0], [0, 1, 2, 3, 4]]


def test_a_sample_is_sorted_without_repeats_and_eligible() -> None:
    eligible = positions(None, 0)
    for seed in range(50):
        drawn = positions(5, seed)
        assert sum(map(len, drawn)) == 5
        for part, allowed in zip(drawn, eligible, strict=True):
            assert part == sorted(set(part))
            assert set(part) <= set(allowed)


def test_a_sample_is_a_function_of_its_seed_and_contains_the_smaller_ones() -> None:
    assert positions(5, 7) == positions(5, 7)
    assert len({str(positions(4, seed)) for seed in range(20)}) > 10
    assert positions(8, 7) == positions(None, 7)
    for part, larger in zip(positions(3, 7), positions(5, 7), strict=True):
        assert set(part) <= set(larger)


def test_every_eligible_position_is_equally_likely() -> None:
    drawn = [(s, t) for seed in range(4000) for s, part in enumerate(positions(1, seed)) for t in part]
    keys = [(s, t) for s, part in enumerate(positions(None, 0)) for t in part]
    times = [drawn.count(key) for key in keys]
    assert sum(times) == 4000
    assert scipy.stats.chisquare(times).pvalue > 0.01


def test_pairs_are_equally_likely_too() -> None:
    drawn = [tuple((s, t) for s, part in enumerate(positions(2, seed)) for t in part) for seed in range(5600)]
    _, times = np.unique([str(pair) for pair in drawn], return_counts=True)
    assert len(times) == 8 * 7 // 2
    assert scipy.stats.chisquare(times).pvalue > 0.01


def test_more_than_there_are_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^positions\.sample: 9 is more than the 8 eligible.*use at most 8"):
        positions(9, 0)
