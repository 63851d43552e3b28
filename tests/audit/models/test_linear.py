"""The oneDNN product against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from audit.models import linear as kernels
from audit.models.linear import OneDNNLinear, chosen_linear, fastest_linear, onednn_agrees

SHAPES = [(1,), (2, 3), (17,), (1, 33), (4, 5, 6), (513,), (1000,)]


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_torch(rows: tuple[int, ...], biased: bool) -> None:
    assert onednn_agrees()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, 40, generator=generator)
    weight = torch.randn(24, 40, generator=generator)
    bias = torch.randn(24, generator=generator) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        direct = kernels.linear(x, weight, bias)
        with OneDNNLinear():
            through = F.linear(x, weight, bias)
    assert direct.shape == (*rows, 24)
    torch.testing.assert_close(direct.double(), exact, rtol=1e-5, atol=2e-5)
    assert torch.equal(through, direct)


def test_a_transposed_weight_and_a_slice_of_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(50, 40, generator=generator), torch.randn(40, 24, generator=generator)
    with torch.inference_mode(), OneDNNLinear():
        found = F.linear(x[7:29], weight.T)
    torch.testing.assert_close(found.double(), x[7:29].double() @ weight.double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_with_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    with OneDNNLinear():
        assert torch.equal(F.linear(x, weight), torch.nn.functional.linear(x, weight))
        assert F.linear(x, weight).dtype == dtype


def test_no_rows() -> None:
    with torch.inference_mode(), OneDNNLinear():
        assert F.linear(torch.empty(0, 8), torch.randn(3, 8)).shape == (0, 3)


def test_keyword_arguments_and_modules() -> None:
    layer, x = torch.nn.Linear(8, 3), torch.randn(4, 8)
    with torch.inference_mode():
        want = layer(x)
        with OneDNNLinear():
            torch.testing.assert_close(layer(x), want)
            torch.testing.assert_close(F.linear(input=x, weight=layer.weight, bias=layer.bias), want)


def test_what_was_chosen_is_called_without_the_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(50, 40), torch.randn(24, 40)
    calls: list[str] = []
    monkeypatch.setattr(kernels, "linear", lambda *given: calls.append("onednn") or F.linear(*given))
    with torch.inference_mode():
        with chosen_linear() as product:
            assert torch.equal(product(x, weight), F.linear(x, weight))
        assert not calls
        with OneDNNLinear():
            with chosen_linear() as product:
                F.linear(x, weight)
                assert not calls
                assert torch.equal(product(x, weight), F.linear(x, weight))
                assert calls == ["onednn"]
                assert product(x.double(), weight.double()).dtype == torch.float64
                assert product(x[:0], weight).shape == (0, 24)
                assert calls == ["onednn"]  # other precisions and no rows stay with torch
            F.linear(x, weight)
            assert calls == ["onednn"] * 2
        with chosen_linear() as product:
            product(x, weight)
        assert calls == ["onednn"] * 2


def test_an_operator_that_is_absent_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "linear", lambda x, weight, bias=None: F.linear(x, weight, bias) * 1.01)
    assert not onednn_agrees()
    assert fastest_linear() == "torch"

    def failing(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernels, "linear", failing)
    assert not onednn_agrees()
