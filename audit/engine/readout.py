"""Read predictions off rows that left the last layer, and compare them with the clean ones.

Shapes: T clean rows, M audited rows, P virtual tokens, R rows of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from audit.models.head import Head
from audit.models.linear import chosen_linear
from audit.outcomes import Baseline, Outcomes, outcomes, outcomes_from_logits

# Logits worked on at a time: on a CPU they and their temporaries should stay in cache, and be enough for the product.
_CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**24}


class Readout:
    """Baseline predictions at the audited rows, and outcomes of virtual tokens against them."""

    def __init__(self, head: Head, hidden_TD: Tensor, rows_M: Tensor, target_T: Tensor) -> None:
        self._head = head
        self._wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        audited_MD = hidden_TD[rows_M]
        self.baseline = Baseline.of(head.logits(audited_MD).to(self._wide), target_T[rows_M])
        self._normed_MD = head.normed(audited_MD) if head.linear else audited_MD
        self._chunk = max(1, _CHUNK_ENTRIES.get(hidden_TD.device.type, 2**20) // self.baseline.logits_MV.shape[1])

    def empty(self, rows: int) -> Outcomes:
        """Room for the outcomes of ``rows`` virtual tokens."""
        return Outcomes.empty(rows, self._wide, self.baseline.logits_MV.device)

    def read(self, hidden_RD: Tensor, row_R: Tensor, into: Outcomes, place_R: Tensor) -> None:
        """Outcomes of rows that belong to the audited rows ``row_R``, stored in ``into`` at ``place_R``."""
        normed_RD = self._head.normed(hidden_RD) if self._head.linear else hidden_RD
        for a in range(0, len(row_R), self._chunk):
            rows, row = normed_RD[a : a + self._chunk], row_R[a : a + self._chunk]
            change = self._change(rows, row)
            with chosen_linear():  # no linear map here, but many small calls of torch
                found = outcomes(change, self.baseline, row)
            lost = torch.nonzero(~torch.isfinite(found.kl) | ~torch.isfinite(found.js)).flatten()
            if len(lost):  # a change beyond the range of exp in float32
                logits = self.baseline.logits_MV[row[lost]].double() + self._change(rows[lost], row[lost]).double()
                found.put(lost, outcomes_from_logits(logits, self.baseline, row[lost]))
            into.put(place_R[a : a + self._chunk], found)

    def _change(self, rows_RD: Tensor, row_R: Tensor) -> Tensor:
        if self._head.linear:
            return self._head.change(rows_RD, self._normed_MD.index_select(0, row_R))
        return self._head.logits(rows_RD).to(self._wide) - self.baseline.logits_MV[row_R]


def next_tokens(sequences: Sequence[Tensor]) -> Tensor:
    """The true next token of every clean row [T]; -1 at the last position of a sequence."""
    return torch.cat([torch.cat([s[1:], s.new_full((1,), -1)]) for s in sequences])
