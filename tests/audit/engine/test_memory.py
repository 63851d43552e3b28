"""Memory: budgets decide how the work is cut up and nothing else; running out of it halves the micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import ready, texts

from audit.engine import Engine
from audit.engine.cost import Sizes, default_memory, micro_batch_for, working_bytes
from audit.interventions import Intervention, Target
from audit.models.shards.errors import out_of_memory

ASKED = [Intervention("zero"), Intervention("reroute"), Intervention("zero", Target("highest", count=2))]
SEQUENCES = texts((12, 5, 9), 41)
POSITIONS = [np.arange(12), np.array([4]), np.arange(1, 9)]
VALUES = ["delta_loss", "kl", "js", "tv", "top1_flip", "delta_logit", "contribution_norm", "gap_norm", "routing_weight"]


def run(engine: Engine, scope: str = "token", layers: tuple[int, ...] = (1, 2)) -> Any:
    return engine.measure(SEQUENCES, POSITIONS, layers=layers, interventions=ASKED, scope=scope)


def same(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    a, b = reference.keyed(a.effects), reference.keyed(b.effects)
    assert a.index.tolist() == b.index.tolist()
    np.testing.assert_allclose(a[VALUES].to_numpy(float), b[VALUES].to_numpy(float), rtol=tolerance, atol=tolerance)


class ExpertsOutOfMemory:
    """Experts that cannot hold more than so many rows at a time."""

    def __init__(self, inner: Any, most: int, error: BaseException, asked: list[int]) -> None:
        self.inner, self.most, self.error, self.asked = inner, most, error, asked

    def outputs(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.inner.outputs(x, index)

    def mixture(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.inner.mixture(x, index, weights)

    def both(self, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.both(*args)


def scarce(monkeypatch: pytest.MonkeyPatch, model: Any, most: int, error: BaseException) -> list[int]:
    asked: list[int] = []
    paths = {layer: ExpertsOutOfMemory(path, most, error, asked) for layer, path in model.experts.items()}
    monkeypatch.setattr(model, "experts", paths)
    return asked


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "python", "allocator"],
)
def test_running_out_halves_and_goes_on(scope: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("gpt_oss", 1)
    plenty = run(Engine(model, memory=2**62, micro_batch=128), scope)
    assert (plenty.micro_batch, plenty.halvings) == (128, 0)
    asked = scarce(monkeypatch, model, 40, error)
    short = run(Engine(model, memory=2**62, micro_batch=128), scope)
    assert (short.micro_batch, short.halvings) == (32, 2)
    assert max(asked) > 40
    same(short, plenty)


def test_a_full_machine_ends_the_run_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("gpt_oss", 1)
    asked = scarce(monkeypatch, model, 0, torch.OutOfMemoryError("no memory at all"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        run(Engine(model, memory=2**62, micro_batch=64))
    assert len(asked) == 3  # with micro-batches of 64, 32 and 16 rows


def test_another_error_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("gpt_oss", 1)
    asked = scarce(monkeypatch, model, 40, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Engine(model, memory=2**62, micro_batch=128))
    assert len([n for n in asked if n > 40]) == 1


def sweeps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """The sequence lengths and number of audited tokens of every sweep that the engine then runs."""
    seen: list[tuple[list[int], int]] = []
    own = engine._run

    def noting(request: Any, micro_batch: int) -> Any:
        seen.append(([len(s) for s in request.sequences], len(request.rows_M)))
        return own(request, micro_batch)

    monkeypatch.setattr(engine, "_run", noting)
    return seen


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_a_tiny_budget_gives_the_same_effects(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("gpt_oss", 1)
    generous = Engine(model, memory=2**40, micro_batch=16)
    together = sweeps(generous, monkeypatch)
    whole = run(generous, scope)
    assert together == [([12, 5, 9], 21)]
    tight = Engine(model, memory=2**40, micro_batch=16)
    # The working memory left of the least budget is 64 MiB, far more than these toys need: take it away by hand.
    sizes = tight.sizes
    per_position = sizes.audited_bytes() + sizes.virtual_bytes() * 8
    layers = 1 if scope == "token" else len(model.layers)
    tight._working = int(16 * sizes.row_bytes(12) + 12 * layers * sizes.clean_bytes() + 6 * per_position)
    split = sweeps(tight, monkeypatch)
    parts = run(tight, scope)
    assert len(split) >= 3
    assert sum(audited for _, audited in split) == 21
    assert any(lengths == [12] and audited < 12 for lengths, audited in split)  # one sequence in several sweeps
    same(parts, whole)
    pd.testing.assert_frame_equal(parts.tokens.to_pandas(), whole.tokens.to_pandas(), rtol=1e-6)


def test_a_budget_below_the_weights_is_refused_with_the_amount_needed() -> None:
    model = ready("gpt_oss", 1)
    with pytest.raises(
        ValueError, match=r"engine.memory: 100 MiB do not hold the weights .* give at least (\d+) MiB"
    ) as error:
        Engine(model, memory=100 * 2**20)
    needed = int(str(error.value).rpartition("at least ")[2].split(" ")[0])
    Engine(model, memory=(needed + 1) * 2**20)
    with pytest.raises(ValueError, match=r"engine.memory"):
        Engine(model, memory=(needed - 2) * 2**20)


def test_a_sequence_that_does_not_fit_is_refused_with_the_amount_needed() -> None:
    engine = Engine(ready("gpt_oss", 1), memory=2**40, micro_batch=16)
    engine._working = 1000
    with pytest.raises(ValueError, match=r"engine.memory: .* do not hold one token of a sequence of 12; give at least"):
        run(engine)


def test_the_micro_batch_follows_the_budget() -> None:
    sizes = Sizes(ready("gpt_oss", 1))
    plenty = working_bytes(sizes, 2**40)
    assert plenty - working_bytes(sizes, 2**40 - 12345) == 12345
    assert micro_batch_for(sizes, 2**40, 12) == 3072
    at_least = sizes.weights + 2**40 - sizes.weights - plenty + 64 * 2**20  # weights, program, the smallest sweep
    assert micro_batch_for(sizes, at_least, 12) == min(3072, 64 * 2**20 // 3 // sizes.row_bytes(12))


def test_the_rows_of_a_request_are_known_before_it_runs() -> None:
    model = ready("olmoe", 1)
    engine = Engine(model, memory=2**40, identity_every=4)
    lengths, positions = [12, 5], [np.arange(12), np.arange(4)]
    cost = engine.cost(lengths, [12, 4], [0, 2], [Intervention("zero")])
    found = engine.measure(SEQUENCES[:2], positions, layers=[0, 2], interventions=[Intervention("zero")])
    assert cost.rows == found.effects.num_rows == 2 * (16 * 2 + 4)


def test_a_budget_that_nobody_gave_holds_the_weights_and_never_more_than_there_is() -> None:
    model = ready("gpt_oss", 1)
    host, large = Sizes(model), Sizes(model, weights=30 * 2**30)
    assert default_memory(large, 64 * 2**30) == 32 * 2**30
    assert default_memory(large, 31 * 2**30) == 31 * 2**30
    assert default_memory(Sizes(model, 30 * 2**30, "cuda"), 80 * 2**30) == 72 * 2**30
    assert Engine(model).memory == host.weights + 2 * 2**30


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_every_word_for_it(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
