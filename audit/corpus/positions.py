"""Which positions of which sequences are audited: a seeded sample over a whole corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audit.config import ConfigError

if TYPE_CHECKING:
    from audit.corpus.sequences import TokenSequence

_STREAM = 2  # keeps the draws of positions apart from the split's, which has the same seed


def eligible_positions(
    sequence: TokenSequence, include_first: bool = False, include_special: bool = False
) -> NDArray[np.bool_]:
    """Which positions of a sequence may be audited, bool [T].

    Position 0 is left out by default, because attention gathers there whatever the token, and so are special tokens.
    The last position is eligible: it has no true next token, but its distribution has all other outcomes.
    """
    eligible = np.ones(len(sequence.token_ids), dtype=np.bool_)
    if not include_special:
        eligible &= ~sequence.special
    eligible[0] &= include_first
    return eligible


def sample_positions(
    sequences: Sequence[TokenSequence],
    count: int | None,
    seed: int,
    include_first: bool = False,
    include_special: bool = False,
) -> list[NDArray[np.int64]]:
    """Positions drawn without replacement, each eligible one of the corpus being equally likely; None takes all.

    Returns ascending positions [n_s] for every sequence, some empty. Every token is given a random number and the
    smallest are taken, so with one seed a larger sample contains every smaller one. Raises ConfigError if there are
    fewer eligible positions than asked for.
    """
    eligible = [eligible_positions(sequence, include_first, include_special) for sequence in sequences]
    available = sum(int(mask.sum()) for mask in eligible)
    if count is None:
        return [np.flatnonzero(mask) for mask in eligible]
    if count > available:
        raise ConfigError(
            f"positions.sample: {count} is more than the {available} eligible positions of the audited documents; "
            f"use at most {available}, or null for all"
        )
    mask = np.concatenate(eligible)
    rank = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,))).random(len(mask))
    rank[~mask] = np.inf
    chosen = np.zeros(len(mask), dtype=np.bool_)
    chosen[np.argsort(rank, kind="stable")[:count]] = True
    ends = np.cumsum([len(part) for part in eligible])[:-1]
    return [np.flatnonzero(part) for part in np.split(chosen, ends)]
