"""Sums, means and centred second moments of rows that belong to groups, in float64 and in a fixed order.

Shapes: R rows, D features, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HOST_BLOCK_BYTES = 1 << 20  # float64 working set of a block: it should stay in the cache of a core
DEVICE_BLOCK_BYTES = 1 << 28  # few launches, a small part of a device's memory


def merge_moments(
    n_a: Tensor, mean_a: Tensor, m2_a: Tensor, n_b: Tensor, mean_b: Tensor, m2_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the union of two samples (Chan, Golub and LeVeque 1983).

    ``n_*`` are counts of the same number of dimensions as the moments (broadcast over features). A part with
    count 0 changes no bit of the other; two empty parts give mean 0 and second moment 0.
    """
    n = (n_a + n_b).clamp(min=1)
    delta = mean_b - mean_a
    share_b = n_b.double() / n
    return mean_a + delta * share_b, m2_a + m2_b + delta.square() * (n_a * share_b)


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Rows sorted by group: ``order_R`` sorts them (stably), ``group_R`` is ascending, ``count_G`` are the sizes."""

    order_R: Tensor
    group_R: Tensor
    count_G: Tensor

    @classmethod
    def of(cls, group_R: Tensor, groups: int) -> RowGroups:
        order_R = group_R.argsort(stable=True)
        return cls(order_R, group_R[order_R], torch.bincount(group_R, minlength=groups))

    def sum(self, x_RD: Tensor) -> Tensor:
        """Sums [G, D] of sorted float64 rows."""
        return _segment_sum(x_RD, self.group_R, self.count_G)

    def moments(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and centred second moment [G, D] of sorted float64 rows, in two passes; 0 for an empty group."""
        mean_GD = self.sum(x_RD) / self.count_G.clamp(min=1)[:, None]
        return mean_GD, self.sum((mean_GD.index_select(0, self.group_R) - x_RD).square_())

    def blocks(self, bytes_per_row: int) -> Iterator[tuple[slice, slice, RowGroups]]:
        """Consecutive whole groups that fit the working set: (slice of groups, slice of sorted rows, the block).

        The sums of a group do not depend on the blocks: a group is never divided.
        """
        rows = (DEVICE_BLOCK_BYTES if self.order_R.is_cuda else HOST_BLOCK_BYTES) // bytes_per_row
        ends = self.count_G.cumsum(0).tolist()
        low = start = 0
        for high, end in enumerate(ends):
            following = ends[high + 1] if high + 1 < len(ends) else None
            if following is not None and following - start <= rows:
                continue
            if end > start:
                inside = slice(start, end)
                block = RowGroups(self.order_R[inside], self.group_R[inside] - low, self.count_G[low : high + 1])
                yield slice(low, high + 1), inside, block
            low, start = high + 1, end


def _segment_sum(x_RD: Tensor, group_R: Tensor, count_G: Tensor) -> Tensor:
    if x_RD.is_cuda:  # index_add_ adds in no fixed order there, and a task run again must give the same bits
        return torch.segment_reduce(x_RD, "sum", lengths=count_G, axis=0, unsafe=True)
    return x_RD.new_zeros(len(count_G), x_RD.shape[1]).index_add_(0, group_R, x_RD)
