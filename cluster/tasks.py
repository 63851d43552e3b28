"""Tasks: the pieces of a run's work that are done, retried, given up and committed as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from audit.interventions import Intervention

if TYPE_CHECKING:
    from audit.corpus import TokenSequence
    from audit.pruning import Pruning

Kind = Literal["observe", "merge", "release", "measure", "prune"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """What a group needs to know, so that it is a message to it: nothing is looked up.

    observe: run ``sequences`` unchanged, keep sums, means and reservoirs. merge: those of ``inputs`` (ids of tasks; for
    the group, the folders they wrote) into one, in this order. release: the metrics of the experts of ``layers`` as
    the code released with arXiv 2606.10703 computed them on ``sequences``. measure: effects at ``positions`` of
    ``sequences``. prune: the losses of ``sequences`` under every one of ``prunings``. These two may draw on a
    ``calibration`` and on ``metrics``, which are named as inputs are.
    """

    id: str
    kind: Kind
    sequences: Sequence[TokenSequence] = ()
    positions: Sequence[np.ndarray] = ()
    layers: tuple[int, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    tokens: bool = True  # measure: whether this task writes the token table's rows of its positions
    attribution: bool = False  # measure: see Engine.measure, as for the next one
    redistribution: bool = False
    prunings: tuple[Pruning, ...] = ()
    inputs: tuple[str, ...] = ()
    calibration: str | None = None
    metrics: str | None = None
    rows: int = 0  # rows it will write (measure, prune), tokens it will read (observe)
    flops: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the tasks that come before."""
        return (*self.inputs, *(name for name in (self.calibration, self.metrics) if name is not None))

    def found(self, folders: Mapping[str, str]) -> Task:
        """The same task with folders in place of the ids it needs."""
        return replace(
            self,
            inputs=tuple(folders[name] for name in self.inputs),
            calibration=None if self.calibration is None else folders[self.calibration],
            metrics=None if self.metrics is None else folders[self.metrics],
        )


class Attempt(NamedTuple):
    """A task that is handed out for the ``number``-th time, from 1."""

    task: Task
    number: int


def digest(tasks: Sequence[Task]) -> str:
    """Hash of everything that decides which rows these tasks write and how they are cut."""
    state = hashlib.sha256()
    for task in tasks:
        facts = [
            task.id,
            task.kind,
            task.layers,
            [asdict(i) for i in task.interventions],
            [asdict(p) for p in task.prunings],
            (task.tokens, task.attribution, task.redistribution),
            [s.index for s in task.sequences],
        ]
        state.update(json.dumps(facts, sort_keys=True).encode())
        for sequence in task.sequences:
            state.update(np.ascontiguousarray(sequence.token_ids, np.int64).tobytes())
        for positions in task.positions:
            state.update(np.ascontiguousarray(positions, np.int64).tobytes() + b"|")
    return state.hexdigest()
