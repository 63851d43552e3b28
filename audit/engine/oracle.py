"""The oracle: one whole forward per effect, with a hook on the experts module. Slow, obvious, independent of the sweep.

It uses none of the sweep's machinery: the model runs by its library's own code and attention, and only the rows that an
intervention names are changed. It is what the sweep is tested against, and what families without plain attention get.

Shapes: T tokens of one sequence, K slots, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from audit.engine.readout import next_tokens
from audit.engine.result import Effects, Request, Result
from audit.engine.worlds import Routed, Worlds, identity_worlds, worlds_of
from audit.interventions import Intervention
from audit.models.experts import ModuleExperts
from audit.models.loading import MoEModel
from audit.models.router import Strike, correction_biases
from audit.models.seam import first_tensor, replaced, with_first
from audit.outcomes import Baseline, Outcomes, outcomes_from_logits


def oracle(model: MoEModel, request: Request) -> Result:
    """All effects of a request, one forward per (sequence, layer, intervention, target) and, in token scope, per token."""
    with model.own_attention():
        return _Oracle(model, request).run()


class _Oracle:
    def __init__(self, model: MoEModel, request: Request) -> None:
        self.model, self.request = model, request
        self.starts = [0]
        for s in request.sequences:
            self.starts.append(self.starts[-1] + len(s))

    def run(self) -> Result:
        request = self.request
        clean = [self._forward(number, {}) for number in range(len(request.sequences))]
        wide = torch.float64 if clean[0].dtype == torch.float64 else torch.float32
        rows_M = request.rows_M
        logits_TV = torch.cat(clean).to(wide)
        baseline = Baseline.of(logits_TV[rows_M], next_tokens(request.sequences)[rows_M])
        effects: list[Effects] = []
        found: list[Outcomes] = []
        changed: list[Tensor] = []
        skipped = 0
        for layer in sorted(request.layers):
            routed = self._routed(layer)
            for intervention in [*request.interventions, None]:
                for worlds in self._worlds(intervention, routed):
                    skipped += worlds.skipped
                    if len(worlds):
                        effect = Effects.of(layer, worlds, routed)
                        found.append(self._measure(layer, effect, routed, baseline))
                        effects.append(effect)
                        changed.append(torch.zeros(len(worlds), dtype=torch.bool, device=rows_M.device))
        total = Outcomes.empty(sum(len(e.worlds) for e in effects), torch.float64, rows_M.device)
        at = 0
        for part in found:
            size = len(part.kl)
            total.put(torch.arange(at, at + size, device=rows_M.device), part)
            at += size
        return Result(effects, baseline, total, torch.cat(changed) if changed else rows_M.new_zeros(0, dtype=torch.bool), skipped)

    # ---- which worlds -----------------------------------------------------------------------------------------------

    def _worlds(self, intervention: Intervention | None, routed: Routed) -> list[Worlds]:
        """Token scope: worlds at audited rows. Sequence scope: for each sequence and target, the rows it is read at."""
        request, top_k = self.request, routed.index_TK.shape[1]
        if intervention is None:
            return [identity_worlds(request.rows_M, top_k, request.identity_every)]
        return [worlds_of(intervention, request.rows_M, routed.index_TK, routed.weights_TK)]

    def _measure(self, layer: int, effect: Effects, routed: Routed, baseline: Baseline) -> Outcomes:
        worlds = effect.worlds
        result = Outcomes.empty(len(worlds), torch.float64, self.request.rows_M.device)
        for i in range(len(worlds)):
            row = int(worlds.parent_P[i])
            number = next(n for n in range(len(self.starts) - 1) if row < self.starts[n + 1])
            start = self.starts[number]
            norms: list[Tensor] = []
            changes = self._changes(layer, worlds[i : i + 1], torch.tensor([row - start], device=worlds.parent_P.device), start, routed, norms)
            logits = self._forward(number, changes)[row - start]
            m = torch.searchsorted(self.request.rows_M, worlds.parent_P[i : i + 1])
            result.put(torch.tensor([i], device=m.device), outcomes_from_logits(logits[None], baseline, m))
            effect.contribution_norm_P[i], effect.gap_norm_P[i] = norms[0][0], norms[1][0]
        return result

    # ---- forwards ---------------------------------------------------------------------------------------------------

    def _forward(self, number: int, forwards: dict[nn.Module, Callable[..., Any]]) -> Tensor:
        with replaced(forwards):
            logits = self.model.module(input_ids=self.request.sequences[number][None], use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits[0]

    def _routed(self, layer: int) -> Routed:
        """What the experts of a layer are given, and return, in plain forwards of all sequences."""
        site = self.model.sites[layer]
        path = ModuleExperts(site.experts)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []

        def experts(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            outputs, mixture = path.both(x, index, weights)
            parts.append((x, index, weights, outputs, mixture))
            return mixture

        for number in range(len(self.request.sequences)):
            self._forward(number, {site.experts: experts})
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        return Routed(joined[0], joined[1], joined[2], joined[3], joined[4])

    def _changes(self, layer: int, worlds: Worlds, at_N: Tensor, start: int, routed: Routed, norms: list[Tensor]) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards that carry out ``worlds`` at the positions ``at_N`` of the sequence that begins at clean row ``start``.

        ``norms`` receives the norm of the contribution acted upon and of the change of the MoE output, [N] each.
        """
        site, kind, target = self.model.sites[layer], worlds.intervention.kind, worlds.intervention.target
        members_NK = worlds.members_PK
        row_N = at_N + start
        index_NK, weights_NK, outputs_NKD = routed.index_TK[row_N], routed.weights_TK[row_N], routed.outputs_TKD[row_N]
        parts_NKD = outputs_NKD * (weights_NK * members_NK)[..., None].to(outputs_NKD.dtype)
        removed_ND = parts_NKD.sum(1)
        own = site.experts.forward
        if target.selection == "shared":
            return self._scale_shared(layer, at_N, worlds.intervention.factor or 0.0, norms)
        norms.append(torch.linalg.vector_norm(removed_ND, dim=-1))
        if kind == "reroute":
            return self._strike(layer, at_N, index_NK, members_NK, routed.mixture_TD[row_N], norms)
        y_ND = routed.mixture_TD[row_N]
        if kind == "renormalize":
            total_N, left_N = weights_NK.sum(1), (weights_NK * ~members_NK).sum(1)
            changed_ND = (total_N / left_N)[:, None].to(y_ND.dtype) * (y_ND - removed_ND)
        elif kind == "scale":
            assert worlds.intervention.factor is not None
            changed_ND = y_ND - removed_ND + worlds.intervention.factor * removed_ND if worlds.intervention.factor != 1.0 else y_ND
        elif kind == "zero":
            changed_ND = y_ND - removed_ND
        else:
            changed_ND = y_ND - removed_ND + self._stored(layer, kind, worlds, row_N, index_NK, weights_NK, members_NK).to(y_ND)
        norms.append(torch.linalg.vector_norm(changed_ND - y_ND, dim=-1))

        def experts(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            rows = first_tensor(output).clone()
            rows[at_N] = changed_ND
            return with_first(output, rows)

        return {site.experts: experts}

    def _stored(self, layer: int, kind: str, worlds: Worlds, row_N: Tensor, index_NK: Tensor, weights_NK: Tensor, members_NK: Tensor) -> Tensor:
        """Weighted calibration outputs that take the place of the experts acted upon [N, D]."""
        calibration, (sequence_T, position_T) = self.request.calibration, self.request.token_T
        assert calibration is not None
        total = 0.0 * calibration.mean(layer)[index_NK[:, 0]]
        for n in range(len(row_N)):
            for k in torch.nonzero(members_NK[n]).flatten().tolist():
                expert = index_NK[n, k : k + 1]
                if kind == "mean":
                    output = calibration.mean(layer)[expert]
                else:
                    at = row_N[n : n + 1]
                    output = calibration.draw(layer, expert, sequence_T[at], position_T[at], worlds.draw_P[n : n + 1], self.request.seed)
                total[n] += weights_NK[n, k].to(total.dtype) * output[0].to(total)
        return total

    def _strike(self, layer: int, at_N: Tensor, index_NK: Tensor, members_NK: Tensor, y_ND: Tensor, norms: list[Tensor]) -> dict[nn.Module, Callable[..., Any]]:
        site = self.model.sites[layer]
        assert site.router is not None
        choose, own = site.router.forward, site.experts.forward
        biases = correction_biases(site.block, site.num_experts)

        def router(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            T = hidden.numel() // hidden.shape[-1]
            removed_TE = torch.zeros(T, site.num_experts, dtype=torch.bool, device=hidden.device)
            for n, row in enumerate(at_N.tolist()):
                removed_TE[row, index_NK[n][members_NK[n]]] = True
            with Strike(removed_TE, biases):
                return choose(hidden, *args, **kwargs)

        def experts(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            norms.append(torch.linalg.vector_norm(first_tensor(output)[at_N] - y_ND, dim=-1))
            return output

        return {site.router: router, site.experts: experts}

    def _scale_shared(self, layer: int, at_N: Tensor, factor: float, norms: list[Tensor]) -> dict[nn.Module, Callable[..., Any]]:
        site = self.model.sites[layer]
        assert site.shared is not None
        own, block = site.shared.forward, site.block.forward
        inside = any(child is site.shared for child in site.block.modules())

        def shared(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            rows = first_tensor(output).clone()
            flat = rows.view(-1, rows.shape[-1])
            if not inside:
                _both(norms, torch.linalg.vector_norm(flat[at_N] * (1.0 - factor), dim=-1), factor)
            flat[at_N] = flat[at_N] * factor
            return with_first(output, rows)

        def comparing(*args: Any, **kwargs: Any) -> Any:
            with replaced({site.shared: own}):
                before = first_tensor(block(*args, **kwargs))
            output = block(*args, **kwargs)
            change = (first_tensor(output) - before).view(-1, before.shape[-1])[at_N]
            _both(norms, torch.linalg.vector_norm(change, dim=-1), factor)
            return output

        return {site.shared: shared, **({site.block: comparing} if inside else {})}


def _both(norms: list[Tensor], gap_N: Tensor, factor: float) -> None:
    norms.append(gap_N / abs(1.0 - factor) if factor != 1.0 else torch.full_like(gap_N, float("nan")))
    norms.append(gap_N)
