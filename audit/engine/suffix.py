"""Sequence scope: the intervention holds at every token of a sequence, so clean keys and values change as well.

One forward from the intervened layer upwards per (sequence, layer, target) gives the effect at every position at once.
Worlds are copies of the whole sequence; several go through the layers side by side, as sequences that do not see each
other.

Shapes: T clean rows of one sequence, B worlds side by side, P = B * T rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audit.engine.birth import CleanLayer, bear, run_clean
from audit.engine.readout import Readout, next_tokens
from audit.engine.result import Effects, Request, Result, redistributes
from audit.engine.sweep import differently_routed
from audit.engine.worlds import Case, Routed, Worlds, joined, sequence_cases
from audit.interventions import Intervention
from audit.models.moe_model import MoEModel
from audit.models.rows import Rows
from audit.models.seam import replaced
from audit.outcomes import BaselineScores, Outcomes


def suffix(model: MoEModel, request: Request, micro_batch: int) -> Result:
    """All effects of a sequence-scope request, one sequence after another. About ``micro_batch`` rows run side
    by side.
    """
    results: list[Result] = []
    start = 0
    for sequence in request.sequences:
        end = start + len(sequence)
        inside = (request.rows_M >= start) & (request.rows_M < end)
        if inside.any():
            tokens = (request.token_T[0][start:end], request.token_T[1][start:end])
            controls = request.rows_M[:: request.identity_every]
            controls = controls[(controls >= start) & (controls < end)] - start
            result = _OneSequence(
                model, request, sequence, start, request.rows_M[inside] - start, controls, tokens, micro_batch
            ).run()
            for effect in result.effects:
                effect.worlds.parent_P += start
            results.append(result)
        start = end
    return _together(results)


class _OneSequence:
    def __init__(
        self,
        model: MoEModel,
        request: Request,
        sequence: Tensor,
        start: int,
        rows_M: Tensor,
        controls: Tensor,
        token_T: tuple[Tensor, Tensor],
        micro_batch: int,
    ) -> None:
        self.model, self.request, self.sequence, self.token_T = model, request, sequence, token_T
        self.start, self.rows_M, self.controls = start, rows_M, controls
        self.side_by_side = max(1, micro_batch // len(sequence))

    def run(self) -> Result:
        model, request = self.model, self.request
        self.rows = Rows(model.module, model.layers, model.position_dims, [self.sequence])
        hidden_TD = self.rows.embedded_TD
        self.clean: list[CleanLayer] = []
        for layer in range(len(model.layers)):
            clean = CleanLayer(layer, hidden_TD, self.rows.prefixes(layer))
            hidden_TD = run_clean(model, self.rows, clean, keep=layer in request.layers)
            self.clean.append(clean)
        readout = Readout(model.head, hidden_TD, self.rows_M, next_tokens([self.sequence]))
        effects: list[Effects] = []
        outcomes: list[Outcomes] = []
        changed: list[Tensor] = []
        skipped = 0
        for layer in sorted(request.layers):
            for intervention, identity in request.asked:
                cases, without = self._cases(layer, intervention, identity)
                skipped += without
                for effect, found, routed_otherwise in self._measure(layer, cases, readout):
                    effects.append(effect)
                    outcomes.append(found)
                    changed.append(routed_otherwise)
        nothing = torch.empty(0, dtype=torch.bool, device=self.rows_M.device)
        return Result(
            effects,
            readout.baseline.scores,
            Outcomes.joined(outcomes, readout.empty(0)),
            torch.cat([*changed, nothing]),
            skipped,
        )

    def _cases(self, layer: int, intervention: Intervention, identity: bool) -> tuple[list[Case], int]:
        routed = self.clean[layer].seen
        rows_M = self.controls if identity else self.rows_M
        cases, skipped = sequence_cases(
            intervention,
            identity,
            (0, len(self.sequence)),
            rows_M,
            routed.index_TK,
            routed.weights_TK,
            self.request.all_positions,
            self.request.missing(intervention, layer),
            self.request.criteria(layer, self.token_T),
        )
        return [case for case in cases if self._wanted(layer, case.done[case.read_N], routed)], skipped

    def _wanted(self, layer: int, read: Worlds, routed: Routed) -> bool:
        return bool(self.request.wanted(layer, read, routed.index_TK[read.parent_P], self.start).any())

    def _measure(self, layer: int, cases: list[Case], readout: Readout) -> list[tuple[Effects, Outcomes, Tensor]]:
        found: list[tuple[Effects, Outcomes, Tensor]] = []
        clean, T = self.clean[layer], len(self.sequence)
        for a in range(0, len(cases), self.side_by_side):
            batch = cases[a : a + self.side_by_side]
            worlds = joined([case.done for case in batch])
            with self.model.shard.visit(layer):
                begun = bear(
                    self.model,
                    self.rows,
                    clean,
                    worlds,
                    self.request.calibration,
                    self.token_T,
                    self.request.seed,
                    redistributes(self.request, worlds),
                )
            hidden_PD, changed_P = self._carry(layer, begun.hidden_PD, len(batch))
            read_N = torch.cat([case.read_N + i * T for i, case in enumerate(batch)])
            effect = Effects.of(layer, worlds[read_N], clean.seen)
            effect.contribution_norm_P, effect.gap_norm_P = begun.contribution_norm_P[read_N], begun.gap_norm_P[read_N]
            effect.redistribution = None if begun.redistribution is None else begun.redistribution[read_N]
            outcomes = readout.empty(len(read_N))
            place = torch.arange(len(read_N), device=read_N.device)
            readout.read(hidden_PD[read_N], torch.searchsorted(self.rows_M, worlds.parent_P[read_N]), outcomes, place)
            controls = changed_P[read_N] if worlds.identity else torch.zeros_like(changed_P[read_N])
            found.append((effect, outcomes, controls))
        return found

    def _carry(self, layer: int, hidden_PD: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """Take the worlds through the layers above; also which rows were routed to other experts than the
        clean ones.
        """
        at_P = torch.arange(len(self.sequence), device=hidden_PD.device).repeat(copies)
        changed_P = torch.zeros(len(at_P), dtype=torch.bool, device=hidden_PD.device)
        for above in range(layer + 1, len(self.model.layers)):
            site = self.model.sites.get(above)
            forwards = {} if site is None else {site.experts: self._watched(above, at_P, changed_P)}
            with replaced(forwards):
                hidden_PD = self.rows.run(above, hidden_PD, self.rows.prefixes(above, copies).rows(None), at_P)
        return hidden_PD, changed_P

    def _watched(self, layer: int, at_P: Tensor, changed_P: Tensor) -> Callable[..., Tensor]:
        mixture, routed = self.model.experts[layer].mixture, self.clean[layer].seen

        def experts(x_PD: Tensor, index_PK: Tensor, weights_PK: Tensor) -> Tensor:
            changed_P.logical_or_(differently_routed(index_PK, routed.index_TK[at_P]))
            return mixture(x_PD, index_PK, weights_PK)

        return experts


def _together(results: list[Result]) -> Result:
    """The results of several sequences as one; parents are numbered on."""
    effects = [effect for result in results for effect in result.effects]
    baseline = BaselineScores.joined([r.baseline for r in results])
    outcomes = Outcomes.joined([r.outcomes for r in results], results[0].outcomes)
    return Result(
        effects, baseline, outcomes, torch.cat([r.changed_P for r in results]), sum(r.skipped for r in results)
    )
