"""Attention for rows that share a clean prefix: every row sees the clean keys before its position, and itself.

Registered with transformers' public attention interface, so that projections, rotary variants, query and key norms and
output gates stay the model's own. A clean token and a virtual token are the same case here: a clean token's own key
happens to be the clean key at its position.

Shapes: R rows, H query heads, G key heads, C head width, T clean rows of all sequences of the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from audit.models.linear import chosen_linear

NAME = "moe_audit"

# Arguments that families pass and that do not change what is computed here: masks are read when calls are recorded.
_HARMLESS = frozenset(
    {
        "attention_mask",
        "sliding_window",
        "is_causal",
        "dropout",
        "position_ids",
        "position_embeddings",
        "cache_position",
    }
    | {
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "past_key_values",
        "return_dict",
    }
    | {"logits_to_keep", "num_items_in_batch", "layer_idx"}
)


class UnsupportedAttention(ValueError):
    """The layer's attention takes an argument whose meaning is not known here."""


class Prefixes:
    """The clean keys and values of one layer's attention modules, and which of them each row sees.

    ``parent_R`` is the clean row a row stands at, ascending. ``start_T`` gives for each clean row the first row of its
    sequence; ``first_T`` the first clean row it may see (start_T but for sliding windows). ``block``: rows whose
    scores are computed together, given the number of query heads.
    """

    def __init__(self, start_T: Tensor, first_T: Tensor, block: Callable[[int], int]) -> None:
        self.start_T, self.first_T, self.block = start_T, first_T, block
        self.modules: list[nn.Module] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def rows(self, parent_R: Tensor | None) -> PrefixAttention:
        """Attention for rows at ``parent_R``; None for the clean rows themselves, whose keys and values are kept."""
        return PrefixAttention(self, parent_R)


class PrefixAttention:
    """One call of a layer: which rows it carries."""

    def __init__(self, prefixes: Prefixes, parent_R: Tensor | None) -> None:
        self.prefixes, self.calls = prefixes, 0
        self.clean = parent_R is None
        self.parent_R = (
            torch.arange(len(prefixes.start_T), device=prefixes.start_T.device) if parent_R is None else parent_R
        )
        self._blocks: list[tuple[int, int, int, int]] | None = None

    def blocks(self, heads: int) -> list[tuple[int, int, int, int]]:
        """Consecutive rows of one sequence: (first row, end row, first key, end key)."""
        if self._blocks is None:
            p = self.prefixes
            size = p.block(heads)
            starts = p.start_T[self.parent_R]
            cuts = (torch.nonzero(starts[1:] != starts[:-1]).flatten() + 1).tolist() if len(starts) else []
            edges = [0, *cuts, len(starts)]
            rows = [(r, min(r + size, b)) for a, b in pairwise(edges) for r in range(a, b, size)]
            first = torch.cummin(p.first_T[self.parent_R].flip(0), 0).values.flip(0).tolist()
            parents = self.parent_R.tolist()
            self._blocks = [(a, b, first[a], parents[b - 1] + 1) for a, b in rows]
        return self._blocks

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention outputs [1, R, H, C] for query [1, H, R, C], key and value [1, G, R, C]."""
        self.calls += 1
        p = self.prefixes
        query_HRC, key_GRC, value_GRC = query[0], key[0], value[0]
        if self.clean:
            p.modules.append(module)
            p.keys[id(module)], p.values[id(module)] = key_GRC, value_GRC
        keys_GTC, values_GTC = p.keys[id(module)], p.values[id(module)]
        out = torch.empty(
            query_HRC.shape[1], query_HRC.shape[0], value_GRC.shape[2], dtype=query.dtype, device=query.device
        )
        with chosen_linear():  # no linear map here, but many small calls of torch
            for a, b, low, high in self.blocks(query_HRC.shape[0]):
                out[a:b] = self._block(
                    query_HRC[:, a:b],
                    key_GRC[:, a:b],
                    value_GRC[:, a:b],
                    keys_GTC[:, low:high],
                    values_GTC[:, low:high],
                    a,
                    b,
                    low,
                    scaling,
                    softcap,
                    sinks,
                ).transpose(0, 1)
        return out[None]

    def _block(
        self,
        q: Tensor,
        k_own: Tensor,
        v_own: Tensor,
        keys: Tensor,
        values: Tensor,
        a: int,
        b: int,
        low: int,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        H, R, C = q.shape
        G = k_own.shape[0]
        grouped = q.reshape(G, H // G, R, C) * scaling
        scores = torch.matmul(grouped.reshape(G, -1, C), keys.transpose(1, 2)).view(G, H // G, R, -1)
        own = (grouped * k_own[:, None]).sum(-1)  # [G, H/G, R]
        column_R = self.parent_R[a:b] - low  # where the row's own position stands among the block's keys
        # The clean key at the row's position gives way to the row's own.
        place = column_R[None, None, :, None].expand(G, H // G, R, 1)
        scores.scatter_(3, place, own[..., None].to(scores.dtype))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        key_J = torch.arange(scores.shape[3], device=q.device)
        # Only columns after the block's first position need a mask, unless a window cuts off early keys.
        from_column = int(column_R[0])
        scores[..., from_column:].masked_fill_(key_J[from_column:] > column_R[:, None], float("-inf"))
        first_R = self.prefixes.first_T[self.parent_R[a:b]] - low
        if int(first_R.max()) > 0:
            scores.masked_fill_(key_J < first_R[:, None], float("-inf"))
        if sinks is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            sink = sinks.reshape(G, H // G, 1, 1).to(scores.dtype).expand(G, H // G, R, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1].contiguous()
        own_weight = weights.gather(3, place)
        weights.scatter_(3, place, 0.0)
        out = torch.matmul(weights.view(G, -1, weights.shape[3]), values).view(G, H // G, R, -1)
        return (out + own_weight * v_own[:, None]).view(H, R, -1)


_active: ContextVar[PrefixAttention | None] = ContextVar("moe_audit_attention", default=None)


@contextmanager
def attending(attention: PrefixAttention) -> Iterator[None]:
    """Within the block the model's attention goes to ``attention``."""
    token = _active.set(attention)
    try:
        yield
    finally:
        _active.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attention = _active.get()
    if attention is None:
        raise UnsupportedAttention("the audit's attention was called outside a sweep")
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    unknown = [
        name for name, given in kwargs.items() if name not in _HARMLESS and given is not None and given is not False
    ]
    if unknown:
        raise UnsupportedAttention(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which the sweep "
            "does not know"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(module, query, key, value, scale, softcap, sinks), None


def _visible(*args: Any, **kwargs: Any) -> Tensor:
    kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    assert isinstance(mask, Tensor)
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _visible)


def first_visible(mask: Tensor | None, length: int) -> list[int]:
    """For each position the first position it sees, from a boolean mask [1, 1, T, T].

    Raises UnsupportedAttention where what a position sees is not one run of positions that ends with itself.
    """
    if mask is None:
        return [0] * length
    visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    if visible.shape != (length, length):
        raise UnsupportedAttention(f"the model masks {tuple(visible.shape)} keys for {length} positions")
    position = torch.arange(length, device=visible.device)
    first = visible.int().argmax(dim=1)
    expected = (position >= first[:, None]) & (position <= position[:, None])
    if not torch.equal(visible, expected):
        raise UnsupportedAttention("a position does not see one unbroken run of positions up to itself")
    return [int(i) for i in first.tolist()]
