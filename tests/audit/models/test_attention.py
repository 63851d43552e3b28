"""The sweep's attention against a dense masked attention in float64, one row and one head at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audit.models import attention
from audit.models.attention import Prefixes, UnsupportedAttention, attending, first_visible


@dataclass
class Case:
    """Random queries, keys and values of clean rows and of virtual ones that stand among them."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None
    block: int = 4

    def draw(self) -> None:
        generator = torch.Generator().manual_seed(len(self.lengths) * 100 + self.heads)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        T = sum(self.lengths)
        starts = np.cumsum((0, *self.lengths))[:-1]
        self.start_T = torch.tensor(np.repeat(starts, self.lengths))
        position = torch.arange(T) - self.start_T
        reach = self.window or T
        self.first_T = self.start_T + (position - reach + 1).clamp_min(0)
        # Several virtual rows at a clean row, none at others, the first and the last included.
        self.parent_P = torch.tensor(sorted([0, 0, *range(1, T, 3), T - 1, T - 1, T - 1]))
        P = len(self.parent_P)
        self.rows = {}
        for name, n in (("clean", T), ("virtual", P)):
            self.rows[name] = (
                normal(1, self.heads, n, self.key_width),
                normal(1, self.key_heads, n, self.key_width),
                normal(1, self.key_heads, n, self.value_width),
            )
        self.sink_H = normal(self.heads) if self.sinks else None


CASES = {
    "one head": Case((5,), 1, 1, 8, 8),
    "a sequence of one": Case((1,), 2, 1, 8, 8),
    "ragged sequences": Case((7, 1, 13, 2), 2, 2, 8, 8),
    "grouped queries": Case((9, 4), 6, 2, 8, 8),
    "latent attention": Case((9, 4), 4, 4, 12, 5, scaling=0.37),
    "sliding window": Case((23, 3, 12), 2, 1, 8, 8, window=5),
    "window of one": Case((6, 3), 2, 2, 8, 8, window=1),
    "sinks": Case((9, 4), 4, 2, 8, 8, sinks=True),
    "soft-capping": Case((9, 4), 2, 2, 8, 8, softcap=0.7),
    "everything": Case((17, 1, 8), 6, 3, 10, 4, window=4, softcap=1.5, sinks=True, scaling=0.9),
    "large blocks": Case((17, 1, 8), 6, 3, 10, 4, window=4, sinks=True, block=1000),
    "blocks of one": Case((7, 5), 2, 1, 8, 8, window=3, block=1),
}


def dense(case: Case, which: str) -> np.ndarray:
    """Row by row: [R, H, C]."""
    query, own_key, own_value = (x[0].numpy() for x in case.rows[which])
    _, keys, values = (x[0].numpy() for x in case.rows["clean"])
    parent = case.parent_P.tolist() if which == "virtual" else list(range(sum(case.lengths)))
    scale = case.key_width**-0.5 if case.scaling is None else case.scaling
    out = np.empty((len(parent), case.heads, case.value_width))
    for r, at in enumerate(parent):
        seen = list(range(int(case.first_T[at]), at))
        for h in range(case.heads):
            g = h // (case.heads // case.key_heads)
            k = np.stack([*(keys[g, i] for i in seen), own_key[g, r]])
            v = np.stack([*(values[g, i] for i in seen), own_value[g, r]])
            scores = k @ query[h, r] * scale
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(case.sink_H[h].item()) if case.sinks else 0.0)
            out[r, h] = (weights / total) @ v
    return out


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str) -> None:
    case = CASES[name]
    case.draw()
    prefixes = Prefixes(case.start_T, case.first_T, lambda heads: case.block)
    module = nn.Module()
    options = {"softcap": case.softcap, "s_aux": case.sink_H, "scaling": case.scaling, "dropout": 0.0}
    for which, rows in (("clean", prefixes.rows(None)), ("virtual", prefixes.rows(case.parent_P))):
        with attending(rows):
            out, weights = attention._attention(module, *case.rows[which], None, **options)
        assert weights is None
        assert out.shape == (1, *dense(case, which).shape)
        np.testing.assert_allclose(out[0].numpy(), dense(case, which), rtol=1e-12, atol=1e-12)


def test_two_attention_modules_of_a_layer_keep_their_own_keys() -> None:
    case = Case((6,), 2, 2, 4, 4)
    case.draw()
    other = Case((6,), 2, 2, 4, 4)
    other.draw()
    other.rows["clean"] = tuple(-x for x in other.rows["clean"])
    prefixes, modules = Prefixes(case.start_T, case.first_T, lambda heads: 4), (nn.Module(), nn.Module())
    with attending(prefixes.rows(None)):
        for module, one in zip(modules, (case, other), strict=True):
            attention._attention(module, *one.rows["clean"])
    assert prefixes.modules == list(modules)
    with attending(prefixes.rows(case.parent_P)):
        for module, one in zip(modules, (case, other), strict=True):
            out, _ = attention._attention(module, *one.rows["virtual"])
            np.testing.assert_allclose(out[0].numpy(), dense(one, "virtual"), rtol=1e-12, atol=1e-12)


def test_an_unknown_argument_is_refused() -> None:
    case = Case((3,), 1, 1, 4, 4)
    case.draw()
    prefixes = Prefixes(case.start_T, case.first_T, lambda heads: 4)
    with attending(prefixes.rows(None)):
        attention._attention(nn.Module(), *case.rows["clean"], None, sliding_window=3, strange_bias=None)
        with pytest.raises(UnsupportedAttention, match="Module passes strange_bias to its attention"):
            attention._attention(nn.Module(), *case.rows["clean"], None, strange_bias=torch.ones(1))


def test_outside_a_sweep_it_refuses() -> None:
    case = Case((3,), 1, 1, 4, 4)
    case.draw()
    with pytest.raises(UnsupportedAttention, match="outside a sweep"):
        attention._attention(nn.Module(), *case.rows["clean"])


def mask(rows: list[str]) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])[None, None]


def test_what_a_position_sees_is_read_off_the_mask() -> None:
    window = mask(["x...", "xx..", ".xx.", "..xx"])
    assert first_visible(window, 4) == [0, 0, 1, 2]
    chunked = mask(["x...", "xx..", "..x.", "..xx"])
    assert first_visible(chunked, 4) == [0, 0, 2, 2]
    additive = torch.where(window, 0.0, torch.finfo(torch.float32).min)
    assert first_visible(additive, 4) == [0, 0, 1, 2]
    assert first_visible(None, 3) == [0, 0, 0]
    assert first_visible(mask(["x"]), 1) == [0]


@pytest.mark.parametrize(
    "rows",
    [["xx", "xx"], ["x...", "xx..", "x.x.", "xxxx"], ["x.", "x."], ["x..", "xx.", ".x."]],
    ids=["bidirectional", "with a hole", "not itself", "up to the one before"],
)
def test_other_masks_are_refused(rows: list[str]) -> None:
    with pytest.raises(UnsupportedAttention, match="one unbroken run"):
        first_visible(mask(rows), len(rows))


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedAttention, match=r"masks \(2, 2\) keys for 5 positions"):
        first_visible(mask(["x.", "xx"]), 5)
