"""The sums kept of one layer, per expert and domain: what they are, how tokens are added, how two are merged.

Shapes: N tokens, K slots, D hidden, E experts, M domains, B bins of the routing weights' histogram, R = N K rows.
g is the routing weight multiplied into an expert's output, E the un-weighted output, ||.|| the Euclidean norm.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from audit.observations.histogram import BINS, LIMIT, bin_of
from audit.observations.moments import RowGroups, merge_moments

POWERS = tuple((a, b) for a in range(3) for b in range(3) if (a, b) != (0, 0))  # of g^a ||E||^b; (0, 0) is the count
SUMS = (*(f"sum_g{a}_e{b}" for a, b in POWERS), "sum_g_ln_g", "sum_easy_ep")


@dataclass(slots=True, eq=False)
class LayerSums:
    """The observations of one layer. Counts are int64, the rest float64.

    Bytes: 8 E M (2 D + 4,096 + E + 14), of which the float64 vectors (mean and second moment of E) take 16 E M D. 64
    experts of hidden size 2,048: 4.2 MB for each layer and domain, 68 MB for each domain of a model of 16 layers.
    """

    tokens_M: Tensor  # all tokens, routed to the expert or not
    count_EM: Tensor  # tokens routed to the expert
    sums_EMC: Tensor  # the columns of SUMS
    scalar_m2_EM2: Tensor  # sum of squared deviations of g and of ||E||
    max_EM: Tensor  # largest absolute entry of E, 0 where the count is
    mean_EMD: Tensor  # of E, 0 where the count is
    m2_EMD: Tensor  # sum of squared deviations of E, per coordinate
    histogram_EMB: Tensor  # of g
    coactivation_EME: Tensor  # tokens routed to both experts; the diagonal is the count

    @classmethod
    def zeros(cls, experts: int, domains: int, hidden: int, device: torch.device | str = "cpu") -> LayerSums:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cells = (experts, domains)
        return cls(
            tokens_M=zeros(domains, dtype=torch.int64),
            count_EM=zeros(*cells, dtype=torch.int64),
            sums_EMC=zeros(*cells, len(SUMS)),
            scalar_m2_EM2=zeros(*cells, 2),
            max_EM=zeros(*cells),
            mean_EMD=zeros(*cells, hidden),
            m2_EMD=zeros(*cells, hidden),
            histogram_EMB=zeros(*cells, BINS, dtype=torch.int64),
            coactivation_EME=zeros(*cells, experts, dtype=torch.int64),
        )

    def column(self, name: str) -> Tensor:
        """One of SUMS, [E, M]."""
        return self.sums_EMC[..., SUMS.index(name)]

    def power(self, a: int, b: int) -> Tensor:
        """Sum of g^a ||E||^b, [E, M], float64."""
        return self.count_EM.double() if a == b == 0 else self.column(f"sum_g{a}_e{b}")

    def scalar_means(self) -> Tensor:
        """Means of g and ||E||, [E, M, 2]; 0 where the count is."""
        sums_EM2 = torch.stack([self.power(1, 0), self.power(0, 1)], dim=-1)
        return sums_EM2 / self.count_EM.clamp(min=1)[..., None]

    def domain(self, index: int) -> LayerSums:
        """A view of one domain, M = 1."""
        inside = slice(index, index + 1)
        by_name = {field.name: getattr(self, field.name) for field in fields(self)}
        return LayerSums(**{name: x[inside] if name == "tokens_M" else x[:, inside] for name, x in by_name.items()})

    def to(self, device: torch.device | str) -> LayerSums:
        """The same sums on another device (shared where they already are on it)."""
        return LayerSums(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def absorb(self, other: LayerSums) -> None:
        """Add the observations of other tokens of the same layer, in place."""
        self._absorb_moments(other.count_EM, other.scalar_means(), other.scalar_m2_EM2, other.mean_EMD, other.m2_EMD)
        self.tokens_M += other.tokens_M
        self.count_EM += other.count_EM
        self.sums_EMC += other.sums_EMC
        self.max_EM = torch.maximum(self.max_EM, other.max_EM)
        self.histogram_EMB += other.histogram_EMB
        self.coactivation_EME += other.coactivation_EME

    def add(
        self,
        domain_N: Tensor,
        index_NK: Tensor,
        weight_NK: Tensor,
        output_NKD: Tensor,
        hidden_before_ND: Tensor,
        hidden_after_ND: Tensor,
    ) -> None:
        """Add a chunk of tokens, in place; arguments and errors as in ``Observations.add``."""
        (_, domains, hidden), top_k = self.mean_EMD.shape, index_NK.shape[1]
        assert int(domain_N.max()) < domains  # a cell of another expert would be counted instead
        cell_NK = index_NK * domains + domain_N[:, None]
        rows = RowGroups.of(cell_NK.flatten(), self.count_EM.numel())
        mean_GD, m2_GD, norm_R, max_R = _vector_moments(rows, output_NKD.reshape(-1, hidden))
        g_R = weight_NK.flatten()[rows.order_R].double()
        if not bool((norm_R.isfinite() & (g_R >= 0) & (g_R < LIMIT)).all()):
            raise ValueError(
                f"an expert's output is not finite, or a routing weight lies outside [0, {LIMIT}): "
                f"largest norm {norm_R.max().item()}, weights {g_R.min().item()} to {g_R.max().item()}"
            )

        turn_R = _turn(hidden_before_ND.double(), hidden_after_ND.double())[rows.order_R // top_k]
        powers = [g_R**a * norm_R**b for a, b in POWERS]
        sums_GC = rows.sum(torch.stack([*powers, torch.special.xlogy(g_R, g_R), g_R * norm_R * turn_R], dim=1))
        scalar_mean_G2, scalar_m2_G2 = rows.moments(torch.stack([g_R, norm_R], dim=1))
        cells = self.count_EM.shape
        count_EM = rows.count_G.view(cells)

        self._absorb_moments(
            count_EM,
            scalar_mean_G2.view(*cells, 2),
            scalar_m2_G2.view(*cells, 2),
            mean_GD.view(*cells, -1),
            m2_GD.view(*cells, -1),
        )
        self.tokens_M += torch.bincount(domain_N, minlength=domains)
        self.count_EM += count_EM
        self.sums_EMC += sums_GC.view(*cells, -1)
        self.max_EM.view(-1).scatter_reduce_(0, rows.group_R, max_R, "amax")
        _count(self.histogram_EMB, rows.group_R * BINS + bin_of(g_R))
        _count(self.coactivation_EME, cell_NK[:, :, None] * cells[0] + index_NK[:, None, :])

    def _absorb_moments(
        self, n_EM: Tensor, scalar_mean_EM2: Tensor, scalar_m2_EM2: Tensor, mean_EMD: Tensor, m2_EMD: Tensor
    ) -> None:
        n_a, n_b = self.count_EM[..., None], n_EM[..., None]
        _, self.scalar_m2_EM2 = merge_moments(
            n_a, self.scalar_means(), self.scalar_m2_EM2, n_b, scalar_mean_EM2, scalar_m2_EM2
        )
        self.mean_EMD, self.m2_EMD = merge_moments(n_a, self.mean_EMD, self.m2_EMD, n_b, mean_EMD, m2_EMD)


def _vector_moments(rows: RowGroups, output_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and second moment [G, D] per group; norm and largest absolute entry [R] per sorted row."""
    hidden = output_RD.shape[1]
    mean_GD = torch.zeros(len(rows.count_G), hidden, dtype=torch.float64, device=output_RD.device)
    m2_GD = torch.zeros_like(mean_GD)
    norm_R = torch.empty(len(output_RD), dtype=torch.float64, device=output_RD.device)
    max_R = torch.empty_like(norm_R)
    for groups, inside, block in rows.blocks(bytes_per_row=8 * hidden):
        x_RD = output_RD.index_select(0, block.order_R)
        max_R[inside] = x_RD.abs().amax(1)
        x_RD = x_RD.double()
        norm_R[inside] = torch.linalg.vector_norm(x_RD, dim=1)
        mean_GD[groups], m2_GD[groups] = block.moments(x_RD)
    return mean_GD, m2_GD, norm_R, max_R


def _turn(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """max(0, 1 - cosine) per token, the cosine of a zero vector read as 0. In float64: the two are nearly parallel."""
    norms_N = torch.linalg.vector_norm(before_ND, dim=1) * torch.linalg.vector_norm(after_ND, dim=1)
    dot_N = torch.linalg.vecdot(before_ND, after_ND)
    return (1 - torch.where(norms_N > 0, dot_N / norms_N, 0.0)).clamp(min=0)


def _count(table: Tensor, index: Tensor) -> None:
    index = index.flatten()
    table.view(-1).index_add_(0, index, torch.ones_like(index))
