"""Outcomes: how far an intervention moved the prediction at a token, from the *difference* of logits.

With p the distribution without the intervention, u = z' - z the change of the logits and v = u - <p, u>:

    KL(p || p') = log1p(<p, expm1(v)>)        delta_loss = KL - v[target]        p' = p exp(v - KL)

Small effects keep their digits this way: a KL of 1e-8 taken from two log-softmaxes in float32 is mostly rounding.
Shapes: R rows, M baseline rows, V vocabulary. Losses and divergences are in nats. Definitions: this project's methods,
arXiv 2606.10703 (delta_loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BaselineScores:
    """How well the model predicts without an intervention, at the audited tokens (M of them)."""

    target_M: Tensor  # true next token; -1 where there is none
    loss_M: Tensor  # nats; nan where there is no next token
    entropy_M: Tensor  # nats

    @staticmethod
    def joined(parts: Sequence[BaselineScores]) -> BaselineScores:
        """The audited tokens of several, one after another."""
        return BaselineScores(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(BaselineScores)))


@dataclass(slots=True)
class Baseline:
    """Predictions without an intervention at the audited tokens (M of them)."""

    logits_MV: Tensor
    probabilities_MV: Tensor
    top_M: Tensor  # most likely next token
    gap_M: Tensor  # how far its logit exceeds the second's, less a thousandth for rounding
    target_M: Tensor  # true next token; -1 where there is none
    loss_M: Tensor  # nats; nan where there is no next token
    entropy_M: Tensor  # nats

    @staticmethod
    def of(logits_MV: Tensor, target_M: Tensor) -> Baseline:
        """From logits (float32 or float64) and true next tokens (-1: none)."""
        log_p = torch.log_softmax(logits_MV, dim=-1)
        p = log_p.exp()
        has = target_M >= 0
        highest = logits_MV.topk(2, dim=-1).values
        loss = -log_p.gather(1, target_M.clamp_min(0)[:, None])[:, 0]
        return Baseline(
            logits_MV,
            p,
            logits_MV.argmax(-1),
            0.999 * (highest[:, 0] - highest[:, 1]),
            target_M,
            loss.masked_fill(~has, float("nan")),
            -(p * log_p).nan_to_num(0.0).sum(-1),
        )

    @property
    def scores(self) -> BaselineScores:
        """What is kept when the logits are not needed any more."""
        return BaselineScores(self.target_M, self.loss_M, self.entropy_M)


@dataclass(slots=True)
class Outcomes:
    """Outcomes of R rows; delta_loss and delta_logit are nan where there is no true next token."""

    delta_loss: Tensor
    kl: Tensor
    js: Tensor
    tv: Tensor
    top1_flip: Tensor  # another token's logit now exceeds that of the token that was on top
    delta_logit: Tensor

    @staticmethod
    def empty(rows: int, dtype: torch.dtype, device: torch.device) -> Outcomes:
        floats = [torch.empty(rows, dtype=dtype, device=device) for _ in range(5)]
        flips = torch.empty(rows, dtype=torch.bool, device=device)
        return Outcomes(floats[0], floats[1], floats[2], floats[3], flips, floats[4])

    @staticmethod
    def joined(parts: Sequence[Outcomes], empty: Outcomes) -> Outcomes:
        """The rows of several, one after another; ``empty`` where there is none."""
        return (
            Outcomes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Outcomes)))
            if parts
            else empty
        )

    def put(self, index_R: Tensor, part: Outcomes) -> None:
        """Store ``part`` at the rows ``index_R``."""
        for f in fields(self):
            values = getattr(self, f.name)
            values[index_R] = getattr(part, f.name).to(values.dtype)


def outcomes(change_RV: Tensor, baseline: Baseline, row_R: Tensor) -> Outcomes:
    """Every outcome of R rows from the change of their logits; ``row_R`` says which baseline row each belongs to.

    ``change_RV`` is overwritten. Rows that all belong to one baseline row are computed fastest. Where a change is too
    large for exp in its precision the divergences come out as inf or nan; :func:`outcomes_from_logits` has no such
    limit.
    """
    # B = 1 or R: a baseline row that all share is read from the nearest cache instead of being copied for each.
    row_B = row_R[:1] if bool((row_R == row_R[:1]).all()) else row_R
    p_BV = baseline.probabilities_MV.index_select(0, row_B)
    spare_RV = torch.empty_like(change_RV)

    def expected(values_RV: Tensor) -> Tensor:  # not vecdot: it is three times slower on a CPU (2.13, rows of 8,192)
        return torch.mul(p_BV, values_RV, out=spare_RV).sum(-1)

    target_R = baseline.target_M[row_R]
    delta_logit_R = change_RV.gather(1, target_R.clamp_min(0)[:, None])[:, 0].masked_fill_(target_R < 0, float("nan"))
    mean_R = expected(change_RV)
    v_RV = change_RV.sub_(mean_R[:, None])
    flip_R = _overtaken(v_RV, baseline, row_R)
    s_RV = torch.expm1(v_RV)
    S_R = expected(s_RV).clamp_min_(0.0)
    kl_R = torch.log1p(S_R)
    # With t = p'/p = (1 + s) / (1 + S): h = (t - 1) / 2, without a second exponential.
    h_RV = s_RV.sub_(S_R[:, None]).mul_((0.5 / (1.0 + S_R))[:, None])
    tv_R = expected(torch.abs(h_RV, out=spare_RV))
    # JS = <p, t log(2t / (1 + t)) - log((1 + t) / 2)> / 2, and log t = v - KL. Bounded entry by entry, so that nothing
    # large cancels where the change is large.
    log_mixture_RV = torch.log1p(h_RV, out=spare_RV)  # log((1 + t) / 2)
    ratio_RV = v_RV.sub_(kl_R[:, None]).sub_(log_mixture_RV)  # log(2t / (1 + t)) <= ln 2
    js_R = 0.5 * expected(ratio_RV.addcmul_(ratio_RV, h_RV, value=2.0).sub_(log_mixture_RV))
    return Outcomes(
        kl_R - (delta_logit_R - mean_R),
        kl_R,
        js_R.clamp_(0.0, 0.6931471805599453),
        tv_R.clamp_(0.0, 1.0),
        flip_R,
        delta_logit_R,
    )


def _overtaken(v_RV: Tensor, baseline: Baseline, row_R: Tensor) -> Tensor:
    """Whether another token's logit now exceeds that of the token that was on top, given changes of logits that may
    be shifted by a number per row.
    """
    top_R1 = baseline.top_M[row_R][:, None]
    # Most changes are too small to close the gap to the second token: their logits need not be formed.
    rise_R = v_RV.amax(-1) - v_RV.gather(1, top_R1)[:, 0]
    near_N = torch.nonzero(~(rise_R < baseline.gap_M[row_R])).flatten()
    logits_NV = baseline.logits_MV[row_R[near_N]].add_(v_RV[near_N])
    flip_R = torch.zeros(len(row_R), dtype=torch.bool, device=row_R.device)
    flip_R[near_N] = logits_NV.gather(1, top_R1[near_N])[:, 0] < logits_NV.amax(-1)
    return flip_R


def outcomes_from_logits(logits_RV: Tensor, baseline: Baseline, row_R: Tensor) -> Outcomes:
    """The same from the logits themselves in float64, by the definitions: slow, plain, for any size of change."""
    log_p = torch.log_softmax(baseline.logits_MV[row_R].double(), -1)
    log_q = torch.log_softmax(logits_RV.double(), -1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    target_R = baseline.target_M[row_R]
    at, has = target_R.clamp_min(0)[:, None], target_R >= 0

    def if_target(x: Tensor) -> Tensor:
        return x.gather(1, at)[:, 0].masked_fill(~has, float("nan"))

    js = 0.5 * ((p * (log_p - log_m)).nan_to_num(0.0).sum(-1) + (q * (log_q - log_m)).nan_to_num(0.0).sum(-1))
    return Outcomes(
        delta_loss=if_target(log_p - log_q),
        kl=(p * (log_p - log_q)).nan_to_num(0.0).sum(-1).clamp_min(0.0),
        js=js.clamp_min(0.0),
        tv=0.5 * (p - q).abs().sum(-1),
        top1_flip=logits_RV.gather(1, baseline.top_M[row_R][:, None])[:, 0] < logits_RV.amax(-1),
        delta_logit=if_target(logits_RV.double() - baseline.logits_MV[row_R].double()),
    )
