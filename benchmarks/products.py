"""The machine's own rate of matrix products, beside which a benchmark states what it reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """Floating-point operations per second: ``sustained`` over all products, and of the ``best`` single one."""

    sustained: float
    best: float


def product_rates(
    product: Callable[[Tensor, Tensor], Any],
    size: int = 2048,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 2.0,
) -> Rates:
    """Rates of square products of ``size``, one after another for ``seconds``. ``product`` returns when it
    is done.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product(a, b)  # warm up
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        product(a, b)
        times.append(time.perf_counter() - start)
    flops = 2.0 * size**3
    return Rates(flops * len(times) / sum(times), flops / min(times))
