"""The normal form of a text and the fingerprint of training, against plain sets of word runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from random import Random

import pytest

from audit.demo.overlap import ALWAYS_FOUND, RUN, SeenText, text_hash, words


def _text(rng: Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**9)}" for _ in range(count)]


def test_normal_form_drops_layout_and_punctuation_but_keeps_case() -> None:
    assert words("If x_1 == 3.5:\n\tPrint('été')") == ["If", "x_1", "3", "5", "Print", "t"]
    assert text_hash("a  b,\nC") == hashlib.sha256(b"a b C").hexdigest()
    assert text_hash("a b c") != text_hash("a b C")


@pytest.mark.parametrize("offset", range(9))
def test_a_long_common_run_is_found_wherever_it_starts(offset: int) -> None:
    rng = Random(offset)
    training = _text(rng, 100)
    common = training[offset : offset + ALWAYS_FOUND]
    other = " ".join([*_text(rng, 5), *common, *_text(rng, 5)])
    assert SeenText.of([" ".join(training)]).contains_part_of(other)


def test_shorter_common_runs_are_never_found() -> None:
    rng = Random(0)
    training = _text(rng, 200)
    seen = SeenText.of([" ".join(training)])
    for start in range(200 - RUN):
        common = training[start : start + RUN - 1]
        assert not seen.contains_part_of(" ".join([*_text(rng, 4), *common, *_text(rng, 4)]))


def test_found_exactly_when_a_stored_run_occurs() -> None:
    rng = Random(1)
    alphabet = ["a", "b"]  # so small that 16 words agree by chance now and then
    training = [[alphabet[rng.randrange(2)] for _ in range(3_000)] for _ in range(3)]
    stored = {tuple(text[start : start + RUN]) for text in training for start in range(0, len(text) - RUN + 1, 8)}
    seen = SeenText.of(" ".join(text) for text in training)
    found = []
    for _ in range(200):
        other = [alphabet[rng.randrange(2)] for _ in range(RUN + 20)]
        expected = any(tuple(other[start : start + RUN]) in stored for start in range(len(other) - RUN + 1))
        assert seen.contains_part_of(" ".join(other)) == expected
        found.append(expected)
    assert 0 < sum(found) < 200


def test_texts_shorter_than_a_run_leave_no_trace(tmp_path: Path) -> None:
    seen = SeenText.of(["too short", ""])
    seen.save(tmp_path / "seen.npy")
    assert SeenText.load(tmp_path / "seen.npy").hashes.size == 0
    assert not seen.contains_part_of("too short")
