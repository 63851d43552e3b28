"""Tasks: the pieces of a run's work that are done, retried, given up and committed as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from audit.interventions import Intervention

if TYPE_CHECKING:
    from audit.corpus import TokenSequence

Kind = Literal["observe", "merge", "measure"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """What a replica needs to know, so that it is a message to it: nothing is looked up.

    observe: run ``sequences`` unchanged, keep sums, means and reservoirs. merge: those of ``inputs`` (ids of tasks; for
    the replica, the folders they wrote) into one, in this order. measure: effects at ``positions`` of ``sequences``,
    drawing on the calibration in ``inputs``, if any.
    """

    id: str
    kind: Kind
    sequences: Sequence[TokenSequence] = ()
    positions: Sequence[np.ndarray] = ()
    layers: tuple[int, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    tokens: bool = True  # measure: whether this task writes the token table's rows of its positions
    inputs: tuple[str, ...] = ()
    rows: int = 0  # effect rows it will write (measure), tokens it will read (observe)
    flops: float = 0.0


def digest(tasks: Sequence[Task]) -> str:
    """Hash of everything that decides which rows these tasks write and how they are cut."""
    state = hashlib.sha256()
    for task in tasks:
        facts = [
            task.id,
            task.kind,
            task.layers,
            [asdict(i) for i in task.interventions],
            task.tokens,
            [s.index for s in task.sequences],
        ]
        state.update(json.dumps(facts, sort_keys=True).encode())
        for sequence in task.sequences:
            state.update(np.ascontiguousarray(sequence.token_ids, np.int64).tobytes())
        for positions in task.positions:
            state.update(np.ascontiguousarray(positions, np.int64).tobytes() + b"|")
    return state.hexdigest()
