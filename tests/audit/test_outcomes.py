"""Outcomes against scipy and the definitions, for changes from invisible to beyond the range of exp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from audit.engine import readout as readout_module
from audit.engine.readout import Readout
from audit.outcomes import Baseline, Outcomes, outcomes, outcomes_from_logits

NAMES = ("kl", "js", "tv", "top1_flip", "delta_loss", "delta_logit")
V = 50


def expected(z: Tensor, changed: Tensor, target: int) -> dict[str, float]:
    """By the definitions, from the logits, in float64."""
    a, b = z.double().numpy(), changed.double().numpy()
    log_p, log_q = log_softmax(a), log_softmax(b)
    p, q = np.exp(log_p), np.exp(log_q)
    return {
        "kl": float(rel_entr(p, q).sum()) if (q > 0).all() else float((p * (log_p - log_q)).sum()),
        "js": float(jensenshannon(p, q) ** 2),
        "tv": float(np.abs(p - q).sum() / 2),
        "top1_flip": float(b.argmax() != a.argmax()),
        "delta_loss": float(log_p[target] - log_q[target]),
        "delta_logit": float(b[target] - a[target]),
    }


def draw(size: float, dtype: torch.dtype, rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, their changes of about ``size``, true tokens."""
    generator = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(rows, V, generator=generator, dtype=torch.float64)).to(dtype)
    change = (size * torch.randn(rows, V, generator=generator, dtype=torch.float64)).to(dtype)
    return z, change, torch.randint(0, V, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("size", "dtype", "relative"),
    [
        (1e-4, torch.float64, 1e-6),
        (0.1, torch.float64, 1e-11),
        (2.0, torch.float64, 1e-12),
        (30.0, torch.float64, 1e-12),
        (1e-2, torch.float32, 2e-3),
        (0.1, torch.float32, 1e-4),
        (2.0, torch.float32, 2e-5),
        (20.0, torch.float32, 2e-5),
    ],
)
def test_every_outcome_equals_its_definition(size: float, dtype: torch.dtype, relative: float) -> None:
    z, change, target = draw(size, dtype)
    baseline = Baseline.of(z, target)
    rows = torch.arange(len(z))
    for found in (
        outcomes(change.clone(), baseline, rows),
        outcomes_from_logits(z.double() + change.double(), baseline, rows),
    ):
        for i in rows.tolist():
            # What is added is the change itself: z + change in float32 would have lost its digits.
            want = expected(z[i].double(), z[i].double() + change[i].double(), int(target[i]))
            for name in NAMES:
                # Differences of numbers near 1: no better than their rounding, in the expected values too.
                slack = 4 * torch.finfo(dtype).eps * min(size, 1.0) + 1e-15
                assert float(getattr(found, name)[i]) == pytest.approx(want[name], rel=relative, abs=slack), (name, i)


def test_a_tiny_change_in_float32_keeps_its_digits() -> None:
    """A KL of 1e-9 from two log-softmaxes in float32 would be rounding alone."""
    z, change, target = draw(1e-4, torch.float32, rows=200)
    found = outcomes(change.clone(), Baseline.of(z, target), torch.arange(200))
    want = [expected(z[i].double(), z[i].double() + change[i].double(), int(target[i])) for i in range(200)]
    kl = np.array([w["kl"] for w in want])
    assert np.median(kl) < 2e-8
    assert np.median(np.abs(found.kl.numpy() - kl) / kl) < 1e-2
    loss = np.array([w["delta_loss"] for w in want])
    assert np.median(np.abs(found.delta_loss.numpy() - loss)) < 1e-10


def test_no_change_is_exactly_none() -> None:
    for dtype in (torch.float32, torch.float64):
        z, change, target = draw(0.0, dtype)
        found = outcomes(change, Baseline.of(z, target), torch.arange(len(z)))
        assert not found.top1_flip.any()
        for name in ("kl", "js", "tv", "delta_loss", "delta_logit"):
            assert getattr(found, name).abs().max() == 0.0


def test_bounds_hold_at_any_size() -> None:
    for size in (1e-6, 1e-3, 1.0, 10.0, 60.0):
        for dtype in (torch.float32, torch.float64):
            z, change, target = draw(size, dtype, rows=300, seed=3)
            found = outcomes(change, Baseline.of(z, target), torch.arange(len(z)))
            fine = torch.isfinite(found.kl)
            assert (found.kl[fine] >= 0).all()
            assert ((found.js[fine] >= 0) & (found.js[fine] <= math.log(2) + 1e-7)).all()
            assert ((found.tv[fine] >= 0) & (found.tv[fine] <= 1)).all()
            if size == 60.0 and dtype == torch.float64:
                assert found.js.max() > 0.69  # two almost disjoint predictions


class HeadStub:
    """A head whose logits are the rows themselves."""

    linear = True

    def logits(self, rows: Tensor) -> Tensor:
        return rows

    def normed(self, rows: Tensor) -> Tensor:
        return rows

    def change(self, rows: Tensor, baseline: Tensor) -> Tensor:
        return rows - baseline


def read(z: Tensor, changed: Tensor, sequences_target: Tensor) -> Outcomes:
    """Through the readout, which takes the plain way where exp in float32 overflows."""
    readout = Readout(HeadStub(), z, torch.arange(len(z)), sequences_target)  # type: ignore[arg-type]
    into = readout.empty(len(z))
    readout.read(changed, torch.arange(len(z)), into, torch.arange(len(z)))
    return into


@pytest.mark.parametrize("size", [1.0, 60.0, 200.0, 1e4])
def test_changes_beyond_exp_in_float32(size: float) -> None:
    z, change, target = draw(size, torch.float32, rows=60, seed=1)
    changed = z + change
    found = read(z, changed, target)
    direct = outcomes((changed - z), Baseline.of(z, target), torch.arange(60))
    if size >= 200:
        assert not torch.isfinite(direct.kl).all()  # so the plain way was needed
    for i in range(60):
        want = expected(z[i], changed[i], int(target[i]))
        for name in NAMES:
            assert float(getattr(found, name)[i]) == pytest.approx(want[name], rel=2e-5, abs=2e-6), (name, i)
    assert found.js.max() <= np.float32(math.log(2))


def test_one_overflowing_row_leaves_its_neighbours_alone() -> None:
    z, change, target = draw(0.1, torch.float32, rows=5)
    alone = read(z, z + change, target)
    change[2, 7] += 500.0
    mixed = read(z, z + change, target)
    assert mixed.kl[2] > 100
    others = torch.tensor([0, 1, 3, 4])
    for name in NAMES:
        assert torch.equal(getattr(mixed, name)[others], getattr(alone, name)[others])


def test_without_a_next_token_loss_and_logit_are_missing_and_the_rest_is_there() -> None:
    z, change, target = draw(1.0, torch.float64)
    with_target = outcomes(change.clone(), Baseline.of(z, target), torch.arange(len(z)))
    target[3] = -1
    for found in (
        outcomes(change.clone(), Baseline.of(z, target), torch.arange(len(z))),
        outcomes_from_logits(z + change, Baseline.of(z, target), torch.arange(len(z))),
    ):
        missing = torch.arange(len(z)) == 3
        assert torch.equal(found.delta_loss.isnan(), missing)
        assert torch.equal(found.delta_logit.isnan(), missing)
        assert found.kl[3] == pytest.approx(float(with_target.kl[3]), rel=1e-12)
        assert torch.isfinite(found.js).all()


def test_baseline_loss_and_entropy() -> None:
    z, _, target = draw(1.0, torch.float64)
    target[0] = -1
    baseline = Baseline.of(z, target)
    p = np.exp(log_softmax(z.numpy(), axis=1))
    assert baseline.entropy_M.numpy() == pytest.approx(-(p * np.log(p)).sum(1), rel=1e-12)
    assert math.isnan(baseline.loss_M[0])
    assert baseline.loss_M[1:].numpy() == pytest.approx(-np.log(p[np.arange(1, 40), target[1:].numpy()]), rel=1e-12)


def test_a_certain_prediction_has_no_entropy() -> None:
    z = torch.zeros(1, V, dtype=torch.float32)
    z[0, 4] = 1000.0
    baseline = Baseline.of(z, torch.tensor([4]))
    assert baseline.entropy_M.tolist() == [0.0]
    assert baseline.loss_M.tolist() == [0.0]


def test_top1_flip_is_about_the_token_that_was_on_top() -> None:
    z = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    # A tie with the former top is no flip; overtaking it is; a tie in the baseline stays one.
    change = torch.tensor([[1.0, 0.0, 0.0], [1.1, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    baseline = Baseline.of(z, torch.tensor([0, 0, 0]))
    assert outcomes(change, baseline, torch.arange(3)).top1_flip.tolist() == [False, True, False]


@pytest.mark.parametrize("row", [[2, 0, 0, 1, 2, 2, 1], [1] * 7])
def test_rows_share_baselines(row: list[int]) -> None:
    z, _, target = draw(1.0, torch.float64, rows=3)
    change = draw(0.5, torch.float64, rows=7, seed=9)[1]
    found = outcomes(change.clone(), Baseline.of(z, target), torch.tensor(row))
    for i, r in enumerate(row):
        want = expected(z[r], z[r] + change[i], int(target[r]))
        for name in NAMES:
            assert float(getattr(found, name)[i]) == pytest.approx(want[name], rel=1e-10, abs=1e-14), (name, i)


@pytest.mark.parametrize("counts", [(300, 1, 70), (5, 40, 3), (1, 0, 0)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_read_alike_however_many_belong_to_a_baseline(
    counts: tuple[int, ...], shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One baseline's rows are compared together where there are enough of them, else with those of others."""
    monkeypatch.setattr(readout_module, "_PRODUCT_ENTRIES", {"cpu": 250 * 2000})
    monkeypatch.setattr(readout_module, "_COMPARED_ENTRIES", {"cpu": 90 * 2000})
    monkeypatch.setattr(readout_module, "_APART_ENTRIES", 50 * 2000)
    generator = torch.Generator().manual_seed(sum(counts))
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    if shuffled:
        row = row[torch.randperm(len(row), generator=generator)]
    z, target = torch.randn(3, 2000, generator=generator, dtype=torch.float64), torch.tensor([7, -1, 1999])
    changed = z[row] + 0.3 * torch.randn(len(row), 2000, generator=generator, dtype=torch.float64)
    readout = Readout(HeadStub(), z, torch.arange(3), target)  # type: ignore[arg-type]
    into, place = readout.empty(len(row)), torch.randperm(len(row), generator=generator)
    readout.read(changed, row, into, place)
    want = outcomes_from_logits(changed, Baseline.of(z, target), row)
    for name in NAMES:
        torch.testing.assert_close(
            getattr(into, name)[place], getattr(want, name), rtol=1e-9, atol=1e-12, equal_nan=True
        )
