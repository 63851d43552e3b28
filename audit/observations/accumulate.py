"""Observations of the experts on clean tokens: sums per (layer, expert, domain) that merge to those of one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from audit.observations import table
from audit.observations.sums import LayerSums
from audit.observations.table import OBSERVATIONS


class Observations:
    """Mergeable observations of the experts of the audited layers, by domain.

    ``domains`` are the names that the codes of ``add`` count through, ``experts`` the number of routed experts of a
    layer.
    """

    def __init__(self, domains: Sequence[str], experts: int) -> None:
        self.domains = tuple(domains)
        self.experts = experts
        self.layers: dict[int, LayerSums] = {}

    def add(
        self,
        layer: int,
        *,
        domain_N: Tensor,
        index_NK: Tensor,
        weight_NK: Tensor,
        output_NKD: Tensor,
        hidden_before_ND: Tensor,
        hidden_after_ND: Tensor,
    ) -> None:
        """Add a chunk of clean tokens of one layer. Everything lies on one device, where the sums stay.

        ``domain_N``: code of the token's domain. ``index_NK``: its active experts, all different. ``weight_NK``:
        their routing weights as multiplied into the outputs. ``output_NKD``: their un-weighted outputs.
        ``hidden_before_ND`` and ``hidden_after_ND``: the residual stream without and with the routed experts' output.
        Inputs of any floating type are accumulated in float64; working memory is a few float64 copies of
        ``hidden_before_ND``, never one of ``output_NKD``.

        Raises ValueError, and adds nothing, where an output is not finite or a routing weight not in [0, 256).
        """
        if not len(domain_N):
            return
        sums = self.layers.get(layer)
        if sums is None:
            sums = LayerSums.zeros(self.experts, len(self.domains), output_NKD.shape[-1], output_NKD.device)
        try:
            sums.add(domain_N, index_NK, weight_NK, output_NKD, hidden_before_ND, hidden_after_ND)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
        self.layers[layer] = sums

    @classmethod
    def merge(cls, parts: Sequence[Observations]) -> Observations:
        """The observations of all parts, in host memory; the parts keep theirs. No token may be in two parts.

        Merged in the order given: a caller that wants the same bits from any number of workers sorts the parts first,
        and divides the tokens into the same parts. Raises ValueError where the parts are not of one model and one
        list of domains.
        """
        if not parts:
            raise ValueError("observations: there is nothing to merge; at least one part is needed")
        merged = cls(parts[0].domains, parts[0].experts)
        for part in parts:
            if (part.domains, part.experts) != (merged.domains, merged.experts):
                raise ValueError(
                    f"observations: parts of {part.experts} experts, domains {part.domains}, and of {merged.experts}, "
                    f"{merged.domains}, cannot be merged; they must come from one audit"
                )
            for layer, sums in part.to("cpu").layers.items():
                if layer not in merged.layers:
                    merged.layers[layer] = LayerSums.zeros(merged.experts, len(merged.domains), sums.mean_EMD.shape[-1])
                merged.layers[layer].absorb(sums)
        return merged

    def to_table(self) -> pa.Table:
        """A row per (layer, expert, domain), in that order, also without a token (schema ``OBSERVATIONS``)."""
        rows = [table.from_sums(layer, sums.to("cpu"), self.domains) for layer, sums in sorted(self.layers.items())]
        return pa.concat_tables([OBSERVATIONS.empty_table(), *rows])

    @classmethod
    def from_table(cls, rows: pa.Table) -> Observations:
        """Observations from the whole table of one part, without loss; rows in any order, domains as they appear.

        Raises ValueError where the table is empty or lacks the row of some cell.
        """
        rows = rows.cast(OBSERVATIONS)
        domains = list(dict.fromkeys(rows["domain"].to_pylist()))
        layers = sorted(set(rows["layer"].to_pylist()))
        experts = 1 + max(rows["expert"].to_pylist(), default=-1)
        cells = experts * len(domains)
        code = [domains.index(name) for name in rows["domain"].to_pylist()]
        keys = set(zip(rows["layer"].to_pylist(), rows["expert"].to_pylist(), code, strict=True))
        if not cells or not len(rows) == len(keys) == len(layers) * cells:
            raise ValueError(
                f"observation table: {len(rows)} rows are not one for each of {len(layers)} layers, {experts} experts "
                f"and {len(domains)} domains; it must be read whole, one part at a time"
            )
        order = np.lexsort((code, rows["expert"].to_numpy(), rows["layer"].to_numpy()))
        observations = cls(domains, experts)
        for index, layer in enumerate(layers):
            of_layer = rows.take(order[index * cells : (index + 1) * cells])
            observations.layers[layer] = table.to_sums(of_layer, experts, len(domains))
        return observations

    def pooled(self, layer: int, domain: str | None = None) -> LayerSums:
        """One layer over all domains, or over the one named (M = 1), in host memory. ValueError for unknown names."""
        if layer not in self.layers:
            raise ValueError(f"layer: {layer} was not observed; observed are {sorted(self.layers)}")
        if domain is not None and domain not in self.domains:
            raise ValueError(f"domain: {domain!r} is unknown; known are {', '.join(self.domains)}")
        sums = self.layers[layer].to("cpu")
        total = LayerSums.zeros(self.experts, 1, sums.mean_EMD.shape[-1])
        for index, name in enumerate(self.domains):
            if domain in (None, name):
                total.absorb(sums.domain(index))
        return total

    def to(self, device: torch.device | str) -> Observations:
        """The same observations on another device (shared where they already are on it)."""
        moved = Observations(self.domains, self.experts)
        moved.layers = {layer: sums.to(device) for layer, sums in self.layers.items()}
        return moved

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(sums.bytes for sums in self.layers.values())
