"""The calibration of a model: observations of its experts, their mean outputs, and stored outputs to draw from.

It comes from documents disjoint from the audited ones; ``mean`` and ``resample`` interventions and the metrics read
it. Shapes: N tokens, K slots, D hidden, E experts, S stored outputs of an expert, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from audit.observations.accumulate import Observations
from audit.observations.hashing import hash_words, token_key
from audit.observations.reservoir import LayerReservoir, Reservoir
from audit.storage import Storage

OBSERVATIONS_FILE = "observations.parquet"
RESERVOIR_FILE = "reservoir.safetensors"


@dataclass(slots=True, eq=False)
class Calibration:
    """Observations and, for interventions that draw outputs (``resample``), a reservoir: ``stored``, or None."""

    observations: Observations
    stored: Reservoir | None = None

    def add(
        self,
        layer: int,
        *,
        domain_N: Tensor,
        sequence_N: Tensor,
        position_N: Tensor,
        index_NK: Tensor,
        weight_NK: Tensor,
        output_NKD: Tensor,
        hidden_before_ND: Tensor,
        hidden_after_ND: Tensor,
    ) -> None:
        """Add a chunk of clean tokens of one layer: ``Observations.add`` and ``Reservoir.add``."""
        self.observations.add(
            layer,
            domain_N=domain_N,
            index_NK=index_NK,
            weight_NK=weight_NK,
            output_NKD=output_NKD,
            hidden_before_ND=hidden_before_ND,
            hidden_after_ND=hidden_after_ND,
        )
        if self.stored is not None:
            self.stored.add(
                layer, index_NK=index_NK, output_NKD=output_NKD, sequence_N=sequence_N, position_N=position_N
            )

    @classmethod
    def merge(cls, parts: Sequence[Calibration]) -> Calibration:
        """The calibration of all parts, in host memory. The observations are merged in the order given (see there).

        Raises ValueError where the parts are not of one model, or only some have a reservoir.
        """
        observations = Observations.merge([part.observations for part in parts])
        stored = [part.stored for part in parts if part.stored is not None]
        if stored and len(stored) < len(parts):
            raise ValueError(
                f"calibration: {len(stored)} of {len(parts)} parts have a reservoir; all or none must have one"
            )
        return cls(observations, Reservoir.merge(stored) if stored else None)

    def mean(self, layer: int) -> Tensor:
        """Mean un-weighted output of every expert over the tokens routed to it, all domains: [E, D], float64.

        The rows of the experts in ``missing(layer)`` are NaN. On the device of the observations.
        """
        sums = self.observations.layers[self._known(layer)]
        n_EM1 = sums.count_EM[..., None].double()
        return (sums.mean_EMD * n_EM1).sum(1) / n_EM1.sum(1)

    def missing(self, layer: int) -> list[int]:
        """Experts no calibration token was routed to: they have neither a mean nor a stored output."""
        unused: list[int] = (self.observations.layers[self._known(layer)].count_EM.sum(1) == 0).nonzero()[:, 0].tolist()
        return unused

    def reservoir(self, layer: int) -> tuple[Tensor, Tensor]:
        """Stored outputs [E, S, D] by ascending priority, zeros where there are fewer than S, and their number [E]."""
        return self._reservoir().contents(self._known(layer))

    def draw(
        self, layer: int, expert_P: Tensor, sequence_P: Tensor, position_P: Tensor, draw_P: Tensor, seed: int
    ) -> Tensor:
        """One stored output [P, D] per virtual token, chosen uniformly by a hash of (seed, layer, expert, token,
        draw).

        It does not depend on what else is in the batch. The draws of a token are with replacement.
        Raises ValueError, naming layer and experts, where an expert has no stored output.
        """
        held = self._reservoir().layers[self._known(layer)]
        count_P = held.count_E[expert_P]
        if bool((count_P == 0).any()):
            empty = sorted(set(expert_P[count_P == 0].tolist()))
            raise ValueError(
                f"resample: layer {layer} has no stored output of experts {empty}: no calibration token was "
                "routed to them; more calibration documents are needed"
            )
        choice_P = hash_words(seed, layer, expert_P, token_key(sequence_P, position_P), draw_P)
        rank_P = (choice_P & torch.iinfo(torch.int64).max) % count_P
        return held.output_ESD[expert_P, held.order_ES[expert_P, rank_P]]

    def checksum(self, layer: int) -> int:
        """An integer that changes with any mean output of the layer, and with the tokens whose outputs are stored."""
        sums = self.observations.layers[self._known(layer)]
        words = [sums.mean_EMD.double().view(torch.int64), sums.count_EM.long()]
        if self.stored is not None:
            words.append(self.stored.layers[layer].priority_ES)
        places = [torch.arange(word.numel(), device=word.device) for word in words]
        return sum(int(hash_words(place, word.flatten()).sum()) for place, word in zip(places, words, strict=True))

    def to(self, device: torch.device | str) -> Calibration:
        """The same calibration on another device (shared where it already is on it)."""
        return Calibration(self.observations.to(device), self.stored.to(device) if self.stored is not None else None)

    @property
    def bytes(self) -> int:
        """Memory held: that of ``Observations.bytes`` and ``Reservoir.bytes``."""
        return self.observations.bytes + (self.stored.bytes if self.stored is not None else 0)

    def save(self, folder: str | Path) -> None:
        """Write observations.parquet and, with a reservoir, reservoir.safetensors to a local folder or fsspec URL.

        Raises audit.storage.StorageError. The observations are written last: where they lie, the folder is complete.
        """
        storage = Storage(str(folder))
        storage.make_folder()
        if self.stored is not None:
            stored = self.stored
            tensors = {name: torch.tensor(getattr(stored, name)) for name in ("experts", "size", "seed")}
            for layer, held in stored.layers.items():
                tensors[f"{layer}.output"] = stored.contents(layer)[0].contiguous()
                tensors[f"{layer}.priority"] = held.priority_ES.sort(dim=1).values
            storage.write(RESERVOIR_FILE, safetensors.torch.save(tensors))
        sink = pa.BufferOutputStream()
        pq.write_table(self.observations.to_table(), sink, compression="zstd")
        storage.write(OBSERVATIONS_FILE, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """What ``save`` wrote, in host memory. Raises ValueError where the folder holds no calibration."""
        storage = Storage(str(folder))
        content = storage.read(OBSERVATIONS_FILE)
        if content is None:
            raise ValueError(
                f"calibration: {folder} has no {OBSERVATIONS_FILE}; name the folder a calibration was saved to"
            )
        observations = Observations.from_table(pq.read_table(pa.BufferReader(content)))
        reservoir = storage.read(RESERVOIR_FILE)
        if reservoir is None:
            return cls(observations)
        tensors = safetensors.torch.load(reservoir)
        stored = Reservoir(*(int(tensors.pop(name)) for name in ("experts", "size", "seed")))
        for layer in sorted({int(name.split(".")[0]) for name in tensors}):
            stored.layers[layer] = LayerReservoir(tensors[f"{layer}.priority"], tensors[f"{layer}.output"])
        return cls(observations, stored)

    def _known(self, layer: int) -> int:
        if layer not in self.observations.layers:
            raise ValueError(f"layer: {layer} was not calibrated; calibrated are {sorted(self.observations.layers)}")
        return layer

    def _reservoir(self) -> Reservoir:
        if self.stored is None:
            raise ValueError("resample: the calibration stored no outputs; run it with a reservoir")
        return self.stored
