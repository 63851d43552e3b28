"""From the last layer's rows to predictions: the model's own final norm, head, scaling and soft-capping.

Where the head is one linear map after the norm, the *change* of the logits is computed from the change of the normed
rows: small effects keep their digits, and the full logits of a virtual token are never formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from audit.models.linear import chosen_linear
from audit.models.seam import replaced
from audit.models.shards.errors import out_of_memory


class Head:
    """Final norm and head of one model. ``linear`` says whether changes of logits may be taken from changes of rows."""

    def __init__(self, module: Any, layers: nn.ModuleList) -> None:
        self._module, self._layers = module, layers
        self._matrix: Any = module.get_output_embeddings()
        device = next(module.parameters()).device
        self._one = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.linear = False
        self.linear = isinstance(self._matrix, nn.Linear) and self._is_linear()

    def _through(self, hidden_RD: Tensor, others: dict[nn.Module, Any]) -> Tensor:
        idle: dict[nn.Module, Any] = {layer: lambda *args, **kwargs: hidden_RD[None] for layer in self._layers}
        with replaced({**idle, **others}):
            logits = self._module(input_ids=self._one, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] as the model gives them."""
        return self._through(hidden_RD, {})

    def normed(self, hidden_RD: Tensor) -> Tensor:
        """Rows [R, D] that :meth:`change` takes: what the head matrix is given, with any logit scaling applied."""
        return self._through(hidden_RD, {self._matrix: lambda rows: rows})

    def change(self, normed_RD: Tensor, baseline_RD: Tensor) -> Tensor:
        """Change of the logits [R, V] between two sets of normed rows, float32 or wider."""
        weight = self._matrix.weight
        with chosen_linear() as linear:
            change = linear((normed_RD - baseline_RD).to(weight.dtype), weight)
        return change if change.dtype == torch.float64 else change.float()

    def _is_linear(self) -> bool:
        weight = self._matrix.weight
        generator = torch.Generator().manual_seed(0)
        a, b = (
            torch.randn(4, weight.shape[1], generator=generator).to(weight.device, weight.dtype) * scale
            for scale in (1.0, 3.0)
        )
        try:
            by_change = self.change(self.normed(a), self.normed(b)).double()
            by_logits = self.logits(a).double() - self.logits(b).double()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return False
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(weight.dtype, 5e-2)
        return by_change.shape == by_logits.shape and bool(
            (by_change - by_logits).abs().max() <= tolerance * by_logits.abs().max()
        )
