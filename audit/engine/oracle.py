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

from audit.engine.attribution import LossGradients, acts_on_one_expert
from audit.engine.readout import next_tokens
from audit.engine.result import Effects, Redistribution, Request, Result, redistributes
from audit.engine.worlds import Case, Routed, Worlds, identity_worlds, sequence_cases, worlds_of
from audit.interventions import Intervention
from audit.models.discovery import ModelError
from audit.models.experts import ModuleExperts
from audit.models.moe_model import MoEModel
from audit.models.router import Strike, correction_biases
from audit.models.seam import first_tensor, replaced, with_first
from audit.outcomes import Baseline, Outcomes, outcomes_from_logits


def oracle(model: MoEModel, request: Request, gradients: LossGradients | None = None) -> Result:
    """All effects of a request, one forward per (sequence, layer, intervention, target) and, in token scope,
    per token. With ``gradients`` also every expert's attribution.
    """
    with model.own_attention():
        return _Oracle(model, request, gradients).run()


class _Oracle:
    def __init__(self, model: MoEModel, request: Request, gradients: LossGradients | None) -> None:
        self.model, self.request, self.gradients = model, request, gradients
        self.shared_TD: dict[int, Tensor] = {}  # what each layer's shared experts add, where it is asked for
        self.starts = [0]
        for s in request.sequences:
            self.starts.append(self.starts[-1] + len(s))

    def run(self) -> Result:
        request = self.request
        clean = [self._forward(number, {}) for number in range(len(request.sequences))]
        logits_TV = torch.cat(clean).to(torch.float64 if clean[0].dtype == torch.float64 else torch.float32)
        baseline = Baseline.of(logits_TV[request.rows_M], next_tokens(request.sequences)[request.rows_M])
        effects: list[Effects] = []
        found: list[Outcomes] = []
        skipped = 0
        for layer in sorted(request.layers):
            routed = self._routed(layer)
            for intervention, identity in request.asked:
                cases, without = self._cases(layer, intervention, identity, routed)
                skipped += without
                for number, case in cases:
                    effect, outcomes = self._measure(layer, number, case, routed, baseline)
                    effects.append(effect)
                    found.append(outcomes)
        empty = Outcomes.empty(0, torch.float64, request.rows_M.device)
        outcomes = Outcomes.joined(found, empty)
        # Nothing is computed in another batch shape here, so an identity world cannot be routed otherwise.
        return Result(effects, baseline.scores, outcomes, torch.zeros_like(outcomes.top1_flip), skipped)

    # ---- which worlds -----------------------------------------------------------------------------------------------

    def _cases(
        self, layer: int, intervention: Intervention, identity: bool, routed: Routed
    ) -> tuple[list[tuple[int, Case]], int]:
        """Worlds with the number of their sequence, and how many targets were skipped.

        In token scope there is one world per effect, in sequence scope one per target.
        """
        request = self.request
        rows_M = request.rows_M[:: request.identity_every] if identity else request.rows_M
        missing = request.missing(intervention, layer)
        criteria = request.criteria(layer, request.token_T)
        cases: list[tuple[int, Case]] = []
        skipped = 0
        for number in range(len(request.sequences)):
            start, end = self.starts[number], self.starts[number + 1]
            inside = rows_M[(rows_M >= start) & (rows_M < end)]
            if not len(inside):
                continue
            if request.scope == "sequence":
                whole, without = sequence_cases(
                    intervention,
                    identity,
                    (start, end),
                    inside,
                    routed.index_TK,
                    routed.weights_TK,
                    request.all_positions,
                    missing,
                    criteria,
                )
                read = [case.done[case.read_N] for case in whole]
                wanted = [request.wanted(layer, worlds, routed.index_TK[worlds.parent_P]).any() for worlds in read]
                cases.extend((number, case) for case, one in zip(whole, wanted, strict=True) if one)
                skipped += without
                continue
            worlds = (
                identity_worlds(inside, routed.index_TK.shape[1], 1)
                if identity
                else worlds_of(intervention, inside, routed.index_TK, routed.weights_TK, missing, criteria)
            )
            skipped += worlds.skipped
            worlds = worlds[request.wanted(layer, worlds, routed.index_TK[worlds.parent_P])]
            first = torch.zeros(1, dtype=torch.long, device=rows_M.device)
            cases.extend((number, Case(worlds[i : i + 1], first)) for i in range(len(worlds)))
        return cases, skipped

    def _measure(
        self, layer: int, number: int, case: Case, routed: Routed, baseline: Baseline
    ) -> tuple[Effects, Outcomes]:
        done, start = case.done, self.starts[number]
        norms: list[Tensor] = []
        acted_upon = torch.nonzero(
            done.members_PK.any(1) | (done.intervention.target.selection == "shared") | done.identity
        ).flatten()
        acted = done[acted_upon]
        logits_TV = self._forward(number, self._changes(layer, acted, acted.parent_P - start, start, routed, norms))
        effect = Effects.of(layer, done[case.read_N], routed)
        row_N = effect.worlds.parent_P
        logits_NV = logits_TV[row_N - start]
        for own, measured in zip((effect.contribution_norm_P, effect.gap_norm_P), norms, strict=True):
            everywhere = measured.new_zeros(len(done))
            everywhere[acted_upon] = measured
            own.copy_(everywhere[case.read_N])
        if redistributes(self.request, done):
            effect.redistribution = self._redistribution(layer, effect.worlds, routed)
        if self.gradients is not None and acts_on_one_expert(done):
            effect.attribution_P = self.gradients.attribution(layer, effect.worlds, routed)
        return effect, outcomes_from_logits(logits_NV, baseline, torch.searchsorted(self.request.rows_M, row_N))

    def _redistribution(self, layer: int, worlds: Worlds, routed: Routed) -> Redistribution:
        row_N, members_NK = worlds.parent_P, worlds.members_PK
        y_ND, removed_ND = routed.mixture_TD[row_N], routed.summed(row_N, members_NK)
        removed_ND = torch.where(members_NK.all(1, keepdim=True), y_ND, removed_ND)
        shared_TD = self.shared_TD.get(layer)
        return Redistribution.of(removed_ND, y_ND - removed_ND, None if shared_TD is None else shared_TD[row_N])

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

        inside = site.shared is not None and any(child is site.shared for child in site.block.modules())
        around: list[Tensor] = []
        forwards: dict[nn.Module, Callable[..., Any]] = {site.experts: experts}
        if self.request.redistribution and site.shared is not None:
            module = site.block if inside else site.shared
            forwards[module] = _noting(module, around)
        for number in range(len(self.request.sequences)):
            self._forward(number, forwards)
        if not parts:
            raise ModelError(f"model: layer {layer} ran without calling its experts; nothing can be removed there")
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        routed = Routed(joined[0], joined[1], joined[2], joined[3], joined[4])
        if around:
            # Within the block what is shared may pass a gate of its own: it is what the block adds to the routed part.
            self.shared_TD[layer] = torch.cat(around) - (routed.mixture_TD if inside else 0.0)
        return routed

    def _changes(
        self, layer: int, worlds: Worlds, at_N: Tensor, start: int, routed: Routed, norms: list[Tensor]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards that carry out ``worlds`` at the positions ``at_N`` of the sequence that begins at
        clean row ``start``.

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
            rest_ND = (outputs_NKD * (weights_NK * ~members_NK)[..., None].to(outputs_NKD.dtype)).sum(1)
            total_N, left_N = weights_NK.sum(1), (weights_NK * ~members_NK).sum(1)
            changed_ND = (total_N / left_N)[:, None].to(y_ND.dtype) * rest_ND
        elif kind == "scale":
            assert worlds.intervention.factor is not None
            changed_ND = (
                y_ND - removed_ND + worlds.intervention.factor * removed_ND
                if worlds.intervention.factor != 1.0
                else y_ND
            )
        elif kind == "zero":
            changed_ND = (y_ND - removed_ND).masked_fill(members_NK.all(1, keepdim=True), 0.0)
        else:
            changed_ND = (
                y_ND - removed_ND + self._stored(layer, kind, worlds, row_N, index_NK, weights_NK, members_NK).to(y_ND)
            )
        norms.append(torch.linalg.vector_norm(changed_ND - y_ND, dim=-1))

        def experts(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            rows = first_tensor(output).clone()
            rows[at_N] = changed_ND
            return with_first(output, rows)

        return {site.experts: experts}

    def _stored(
        self,
        layer: int,
        kind: str,
        worlds: Worlds,
        row_N: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        members_NK: Tensor,
    ) -> Tensor:
        """Weighted calibration outputs that take the place of the experts acted upon [N, D]."""
        calibration, (sequence_T, position_T) = self.request.calibration, self.request.token_T
        assert calibration is not None
        total = torch.zeros(len(row_N), calibration.mean(layer).shape[1], dtype=torch.float64, device=row_N.device)
        for n in range(len(row_N)):
            for k in torch.nonzero(members_NK[n]).flatten().tolist():
                expert = index_NK[n, k : k + 1]
                if kind == "mean":
                    output = calibration.mean(layer)[expert]
                else:
                    at = row_N[n : n + 1]
                    output = calibration.draw(
                        layer, expert, sequence_T[at], position_T[at], worlds.draw_P[n : n + 1], self.request.seed
                    )
                total[n] += weights_NK[n, k].to(total.dtype) * output[0].to(total)
        return total

    def _strike(
        self, layer: int, at_N: Tensor, index_NK: Tensor, members_NK: Tensor, y_ND: Tensor, norms: list[Tensor]
    ) -> dict[nn.Module, Callable[..., Any]]:
        site = self.model.sites[layer]
        assert site.router is not None
        choose, own = site.router.forward, site.experts.forward

        def router(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            T = hidden.numel() // hidden.shape[-1]
            removed_TE = torch.zeros(T, site.num_experts, dtype=torch.bool, device=hidden.device)
            for n, row in enumerate(at_N.tolist()):
                removed_TE[row, index_NK[n][members_NK[n]]] = True
            with Strike(removed_TE, correction_biases(site.block, site.num_experts)):
                return choose(hidden, *args, **kwargs)

        def experts(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            norms.append(torch.linalg.vector_norm(first_tensor(output)[at_N] - y_ND, dim=-1))
            return output

        return {site.router: router, site.experts: experts}

    def _scale_shared(
        self, layer: int, at_N: Tensor, factor: float, norms: list[Tensor]
    ) -> dict[nn.Module, Callable[..., Any]]:
        site, module = self.model.sites[layer], self.model.sites[layer].shared
        assert module is not None
        own, block = module.forward, site.block.forward
        inside = any(child is module for child in site.block.modules())

        def shared(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            rows = first_tensor(output).clone()
            flat = rows.view(-1, rows.shape[-1])
            if not inside:
                _both(norms, torch.linalg.vector_norm(flat[at_N] * (1.0 - factor), dim=-1), factor)
            flat[at_N] = flat[at_N] * factor
            return with_first(output, rows)

        def comparing(*args: Any, **kwargs: Any) -> Any:
            with replaced({module: own}):
                before = first_tensor(block(*args, **kwargs))
            output = block(*args, **kwargs)
            change = (first_tensor(output) - before).view(-1, before.shape[-1])[at_N]
            _both(norms, torch.linalg.vector_norm(change, dim=-1), factor)
            return output

        return {module: shared, site.block: comparing} if inside else {module: shared}


def _noting(module: nn.Module, outputs: list[Tensor]) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        rows = first_tensor(output)
        outputs.append(rows.reshape(-1, rows.shape[-1]))
        return output

    return forward


def _both(norms: list[Tensor], gap_N: Tensor, factor: float) -> None:
    norms.append(gap_N / abs(1.0 - factor) if factor != 1.0 else torch.full_like(gap_N, float("nan")))
    norms.append(gap_N)
