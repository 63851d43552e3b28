"""Simulated pruning: the losses of a model whose routers do not know the removed experts, at any token.

Nothing is written and no weight is touched: the removed experts are struck from the router's candidates (reroute, scope
sequence). A batch of sequences runs once without pruning, and what enters every layer is kept, so that a pruning runs
from its first layer on. Families whose state runs along the sequence by other means than attention run whole forwards.

Shapes: N rows, T clean rows of all sequences of a batch, M those with a true next token, E experts, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audit.engine.readout import Readout, next_tokens
from audit.models.discovery import Site
from audit.models.moe_model import MoEModel
from audit.models.router import Strike, correction_biases
from audit.models.rows import Rows
from audit.models.seam import replaced
from audit.outcomes import Baseline, Outcomes, outcomes_from_logits

Removed = Mapping[int, Sequence[int]]  # layer: experts that are removed there


class PrunedForward:
    """A batch of sequences, run once without pruning and then under as many prunings as asked for.

    Keeps the hidden states that enter every layer, layers x T x D values, and the logits and probabilities at the M
    rows. Raises ValueError where the model's routers cannot do without an expert.
    """

    def __init__(self, model: MoEModel, sequences: Sequence[Tensor]) -> None:
        if model.reroute_refused is not None:
            raise ValueError(f"model: {model.description.source} cannot be pruned, {model.reroute_refused}")
        self._model, self._sequences = model, sequences
        target_T = next_tokens(sequences)
        self.rows_M = torch.nonzero(target_T >= 0).flatten()
        with model.kernels():
            if model.description.engine == "sweep":
                self._rows = Rows(model.module, model.layers, model.position_dims, sequences)
                self._entering: list[Tensor] = []
                hidden_TD = self._run(0, self._rows.embedded_TD, {}, self._entering)
                self._readout = Readout(model.head, hidden_TD, self.rows_M, target_T)
                self._baseline = self._readout.baseline
            else:
                self._baseline = Baseline.of(self._logits({}), target_T[self.rows_M])

    @property
    def baseline_loss_M(self) -> Tensor:
        """Cross-entropy of the true next token without pruning, nats."""
        return self._baseline.loss_M

    def outcomes(self, removed: Removed) -> Outcomes:
        """Outcomes of the M rows without the experts ``removed``, against the unpruned model."""
        removed = {layer: experts for layer, experts in removed.items() if len(experts)}
        first = min(removed, default=len(self._model.layers) - 1)
        row_M = torch.arange(len(self.rows_M), device=self.rows_M.device)
        with self._model.kernels():
            if self._model.description.engine != "sweep":
                return outcomes_from_logits(self._logits(removed), self._baseline, row_M)
            hidden_TD = self._run(first, self._entering[first], removed)
            found = self._readout.empty(len(row_M))
            self._readout.read(hidden_TD[self.rows_M], row_M, found, row_M)
            return found

    def _run(self, first: int, hidden_TD: Tensor, removed: Removed, entering: list[Tensor] | None = None) -> Tensor:
        """The last layer's output [T, D] for rows that enter layer ``first``; what enters each goes to ``entering``."""
        model = self._model
        for layer in range(first, len(model.layers)):
            if entering is not None:
                entering.append(hidden_TD)
            forwards: dict[nn.Module, Callable[..., Any]] = {}
            if layer in model.sites:
                forwards[model.sites[layer].experts] = model.experts[layer].mixture
            if layer in removed:
                forwards.update(_struck(model.sites[layer], removed[layer]))
            with replaced(forwards):
                hidden_TD = self._rows.run(layer, hidden_TD, self._rows.prefixes(layer).rows(None))
        return hidden_TD

    def _logits(self, removed: Removed) -> Tensor:
        """Logits [M, V] by the library's own code and attention, one whole forward per sequence."""
        model = self._model
        with contextlib.ExitStack() as stack:
            stack.enter_context(model.own_attention())
            for layer, experts in removed.items():
                stack.enter_context(replaced(_struck(model.sites[layer], experts)))
            logits = [model.module(input_ids=s[None], use_cache=False).logits[0] for s in self._sequences]
        logits_MV = torch.cat(logits)[self.rows_M]
        return logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()


def _struck(site: Site, experts: Sequence[int]) -> dict[nn.Module, Callable[..., Any]]:
    """The layer's router, to which the experts do not exist."""
    router = site.router
    assert router is not None  # else reroute had been refused
    choose = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        removed_E = torch.zeros(site.num_experts, dtype=torch.bool, device=given.device)
        removed_E[list(experts)] = True
        with Strike(removed_E.expand(given.shape[:-1].numel(), -1), correction_biases(site.block, site.num_experts)):
            return choose(*args, **kwargs)

    return {router: forward}
