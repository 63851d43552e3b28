"""Strike experts from a router's candidates, row by row, and let the router choose again by its own rule.

The router's own forward runs. On the way three things are changed for a row without expert i: the score of i is -inf
where the linear map produces it (no probability mass, sigmoid 0), -inf again where a correction bias is added to it,
and -inf where the final choice over all experts is made. :func:`verify` checks at load that this is enough for a
given router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from audit.models.discovery import is_experts

_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_TOPK = {torch.topk, Tensor.topk}


class Strike(TorchFunctionMode):
    """Within this context the experts marked in ``removed_NE`` do not exist for the row."""

    def __init__(self, removed_NE: Tensor, biases: Sequence[Tensor]) -> None:
        super().__init__()
        self._removed_NE, self._biases = removed_NE, {b.data_ptr() for b in biases}
        self.linear_hits = self.bias_hits = self.choice_hits = 0

    def _struck(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self._removed_NE.view(scores.shape), float("-inf"))

    def _scores_experts(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.shape[-1:] == self._removed_NE.shape[-1:]
            and value.numel() == self._removed_NE.numel()
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and self._scores_experts(args[0]):
            self.choice_hits += 1
            return func(self._struck(args[0]), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func is F.linear and self._scores_experts(result):
            self.linear_hits += 1
            return self._struck(result)
        if (
            func in _ADD
            and self._scores_experts(result)
            and any(isinstance(a, Tensor) and a.data_ptr() in self._biases for a in args)
        ):
            self.bias_hits += 1
            return self._struck(result)
        return result


def correction_biases(block: nn.Module, num_experts: int) -> list[Tensor]:
    """Vectors over the experts that the block or its router adds to the scores (buffers or parameters)."""
    inside_experts = {id(p) for m in block.modules() if is_experts(m) for p in (*m.parameters(), *m.buffers())}
    candidates = [*block.parameters(), *block.buffers()]
    return [t for t in candidates if id(t) not in inside_experts and t.numel() == num_experts and t.dim() in (1, 2)]


@torch.inference_mode()
def verify(
    choose: Callable[[Tensor | None], tuple[Tensor, Tensor, Strike | None]],
    rows: int,
    num_experts: int,
    biases: Sequence[Tensor],
    generator: torch.Generator,
) -> str | None:
    """Why ``reroute`` must be refused for a router, or None where it may be used.

    ``choose(removed_NE)`` routes fixed probe rows and returns (index [N, K], weights [N, K], the Strike used).
    """
    index, weights, _ = choose(None)
    K = index.shape[1]
    nobody = torch.zeros(rows, num_experts, dtype=torch.bool, device=index.device)
    same_index, same_weights, strike = choose(nobody)
    assert strike is not None
    if not torch.equal(index, same_index) or not torch.equal(weights, same_weights):
        return "striking no expert changes the router's choice"
    if strike.linear_hits == 0:  # a choice alone would leave the struck expert its share of a softmax
        return "the router's linear map was not seen"
    if biases and strike.bias_hits == 0 and strike.choice_hits == 0:
        return "the router holds a correction bias, but adding it was not seen"
    for count in range(1, min(3, num_experts - K) + 1):
        slots = torch.rand(rows, K, generator=generator).argsort(1)[:, : min(count, K)].to(index.device)
        removed = torch.zeros_like(nobody).scatter_(1, index.gather(1, slots), True)
        new_index, new_weights, _ = choose(removed)
        if removed.gather(1, new_index).any():
            return "a struck expert was chosen again"
        if new_index.shape != index.shape or not torch.isfinite(new_weights).all():
            return "the router's weights are not finite once an expert is struck"
        if (new_index.sort(1).values.diff(dim=1) == 0).any():
            return "the router chose one expert twice once another was struck"
    return None
