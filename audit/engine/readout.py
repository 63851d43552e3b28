"""Read predictions off rows that left the last layer, and compare them with the clean ones.

Shapes: T clean rows, M audited rows, P virtual tokens, R rows of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from audit.models.head import Head
from audit.models.linear import chosen_linear
from audit.outcomes import Baseline, Outcomes, outcomes, outcomes_from_logits

# Logits formed at a time: enough rows for the product. Those compared at a time: on a CPU they should stay in cache.
_PRODUCT_ENTRIES = {"cpu": 2**22, "cuda": 2**24}
_COMPARED_ENTRIES = {"cpu": 2**19, "cuda": 2**24}
# A baseline row is worth comparing apart from others where its own rows have so many logits, on average.
_APART_ENTRIES = 2**17


class Readout:
    """Baseline predictions at the audited rows, and outcomes of virtual tokens against them."""

    def __init__(self, head: Head, hidden_TD: Tensor, rows_M: Tensor, target_T: Tensor) -> None:
        self._head = head
        self._wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        audited_MD = hidden_TD[rows_M]
        self.baseline = Baseline.of(head.logits(audited_MD).to(self._wide), target_T[rows_M])
        self._normed_MD = head.normed(audited_MD) if head.linear else audited_MD
        device, width = hidden_TD.device.type, self.baseline.logits_MV.shape[1]
        self._product, self._compared = (
            max(1, entries.get(device, entries["cpu"]) // width) for entries in (_PRODUCT_ENTRIES, _COMPARED_ENTRIES)
        )
        self._apart = _APART_ENTRIES / width

    def empty(self, rows: int) -> Outcomes:
        """Room for the outcomes of ``rows`` virtual tokens."""
        return Outcomes.empty(rows, self._wide, self.baseline.logits_MV.device)

    def read(self, hidden_RD: Tensor, row_R: Tensor, into: Outcomes, place_R: Tensor) -> None:
        """Outcomes of rows that belong to the audited rows ``row_R``, stored in ``into`` at ``place_R``."""
        normed_RD = self._head.normed(hidden_RD) if self._head.linear else hidden_RD
        parts: list[Outcomes] = []
        for a in range(0, len(row_R), self._product):
            row = row_R[a : a + self._product]
            change = self._change(normed_RD[a : a + self._product], row)
            with chosen_linear():  # no linear map here, but many small calls of torch
                parts += (outcomes(change[part], self.baseline, row[part]) for part in self._parts(row))
        found = Outcomes.joined(parts, self.empty(0))
        lost = torch.nonzero(~torch.isfinite(found.kl) | ~torch.isfinite(found.js)).flatten()
        for some in torch.split(lost, self._compared):  # a change beyond the range of exp in float32
            logits = self.baseline.logits_MV[row_R[some]].double() + self._change(normed_RD[some], row_R[some]).double()
            found.put(some, outcomes_from_logits(logits, self.baseline, row_R[some]))
        into.put(place_R, found)

    def _parts(self, row_R: Tensor) -> list[slice]:
        """Consecutive rows to be compared together: of one baseline row each, where most have many."""
        cuts = torch.nonzero(row_R[1:] != row_R[:-1]).flatten() + 1
        apart = len(row_R) >= self._apart * (len(cuts) + 1)
        edges = [0, *(cuts.tolist() if apart else ()), len(row_R)]
        return [part for a, b in pairwise(edges) for part in _evenly(a, b, self._compared)]

    def _change(self, rows_RD: Tensor, row_R: Tensor) -> Tensor:
        if self._head.linear:
            return self._head.change(rows_RD, self._normed_MD.index_select(0, row_R))
        return self._head.logits(rows_RD).to(self._wide) - self.baseline.logits_MV[row_R]


def _evenly(start: int, end: int, about: int) -> list[slice]:
    """Parts of about that many rows each: a remainder of a few would cost a chunk's calls again."""
    number = max(1, round((end - start) / about))
    edges = [start + (end - start) * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def next_tokens(sequences: Sequence[Tensor]) -> Tensor:
    """The true next token of every clean row [T]; -1 at the last position of a sequence."""
    return torch.cat([torch.cat([s[1:], s.new_full((1,), -1)]) for s in sequences])
