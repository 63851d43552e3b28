"""Which kernel multiplies by a weight matrix on a CPU: torch's own, or oneDNN's.

On processors for which MKL has no tuned kernels oneDNN is more than twice as fast. The operator is one of torch's
private ones, so it is used only where :func:`onednn_agrees` has just compared it with ``torch.nn.functional.linear``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LinearPath = Literal["torch", "onednn"]


# oneDNN builds and keeps one kernel per number of rows, at about 0.5 ms and 0.7 MB each: allow few of them.
_ROW_STEPS = ((512, 16), (2**62, 64))


def whole_rows(rows: int) -> int:
    """``rows`` rounded up to a number for which a kernel is worth having."""
    step = next(step for most, step in _ROW_STEPS if rows <= most)
    return -(-rows // step) * step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias through oneDNN. Shapes as in torch.nn.functional.linear; float32 on the CPU."""
    rows = x.numel() // x.shape[-1]
    padded = whole_rows(rows)
    if padded == rows:
        return _product(x, weight, bias)
    filled = x.new_zeros(padded, x.shape[-1])
    filled[:rows] = x.reshape(rows, -1)
    return _product(filled, weight, bias)[:rows].view(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _linear_where_possible(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return linear(x, weight, bias)
    return F.linear(x, weight, bias)


_in_use: ContextVar[Callable[..., Tensor]] = ContextVar("moe_audit_linear", default=F.linear)


@contextmanager
def chosen_linear() -> Iterator[Callable[..., Tensor]]:
    """Gives what torch.nn.functional.linear does here, and within the block torch is called without the detour that
    :class:`OneDNNLinear` makes every one of its functions take: some 7 % of a sweep of small products.
    """
    product = _in_use.get()
    with torch._C.DisableTorchFunction():
        yield product


class OneDNNLinear(TorchFunctionMode):
    """Within this context float32 CPU calls of torch.nn.functional.linear go through oneDNN."""

    def __enter__(self) -> OneDNNLinear:
        self._before = _in_use.set(_linear_where_possible)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        _in_use.reset(self._before)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            return _linear_where_possible(*args)
        return func(*args, **(kwargs or {}))


def onednn_agrees() -> bool:
    """Whether the operator exists here and equals torch's linear to float32 rounding."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows, inner, outer in ((1, 8, 5), (33, 96, 40), (7, 256, 64)):
            x, weight, bias = (torch.randn(*s, generator=generator) for s in ((rows, inner), (outer, inner), (outer,)))
            for b in (None, bias):
                exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
                try:
                    ours = linear(x, weight, b)
                except RuntimeError:
                    return False
                if not torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5):
                    return False
    return True


def fastest_linear(repeats: int = 8) -> LinearPath:
    """Time both, in turns, on a product of an expert's size and one of a head's, and return the faster. Takes about
    50 ms.
    """
    if not onednn_agrees():
        return "torch"
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 256), (128, 4096))  # rows, width
    inputs = [(torch.randn(n, 256, generator=generator), torch.randn(m, 256, generator=generator)) for n, m in shapes]
    candidates: dict[LinearPath, Callable[[Tensor, Tensor], Tensor]] = {"torch": F.linear, "onednn": linear}
    best = {path: [float("inf")] * len(inputs) for path in candidates}

    def seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
        start = time.perf_counter()
        product(x, weight)
        return time.perf_counter() - start

    with torch.inference_mode():
        for _ in range(repeats + 1):
            for path, product in candidates.items():
                best[path] = [min(b, seconds(product, *given)) for b, given in zip(best[path], inputs, strict=True)]
    return min(best, key=lambda path: sum(best[path]))
