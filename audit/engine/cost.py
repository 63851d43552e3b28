"""What a request costs before it runs: virtual tokens, floating-point operations, bytes of working memory.

Also the other way round: how many rows may go through a layer at once, and how many tokens into one sweep, in a budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from audit.interventions import Intervention
from audit.models.description import ModelDescription, text_config
from audit.models.discovery import Site, whole_shape

# Python, torch, transformers and Arrow once imported (CPU), or a CUDA context with its libraries: measured
# 0.55-0.62 GiB.
PROGRAM_BYTES = 640 * 2**20
DEFAULT_MICRO_BATCH = {"cpu": 3072, "cuda": 16384}
SMALLEST_MICRO_BATCH = 16
# More clean rows than this in one sweep buy nothing: micro-batches are full long before.
MOST_CLEAN_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Cost:
    """``rows``: effects, identity controls included. ``flops``: multiplications and additions. ``bytes``: of
    the effect table.
    """

    rows: int
    flops: float
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.rows + other.rows, self.flops + other.flops, self.bytes + other.bytes)


BYTES_PER_EFFECT = 45  # of Parquet, zstd: measured on the demo audit
BYTES_PER_FLOAT = 4  # of a further column of measured float32 values: they hardly compress


class Sized(Protocol):
    """What costs are computed from: a loaded model, or one built from its configuration without weights."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def sites(self) -> Mapping[int, Site]: ...
    @property
    def description(self) -> ModelDescription: ...
    @property
    def device(self) -> torch.device: ...


class Sizes:
    """The dimensions of a model that costs depend on.

    ``weights``: bytes of them on the device; None: of all. ``device``: the type of the one that will compute; None:
    the model's.
    """

    def __init__(self, model: Sized, weights: int | None = None, device: str | None = None) -> None:
        config = text_config(model.module.config)
        self.element = next(model.module.parameters()).element_size()
        self.weights = model.description.bytes if weights is None else weights
        self.hidden, self.vocabulary, self.top_k = (
            model.description.hidden_size,
            model.description.vocabulary,
            model.description.top_k,
        )
        self.heads = int(getattr(config, "num_attention_heads", 1) or 1)
        self.layers = len(model.layers)
        self.moe_layers = set(model.sites)
        self.device = device or model.device.type
        self.active = [_active_parameters(model, layer) for layer in range(self.layers)]
        site = next(iter(model.sites.values()))
        stacked = [shape for p in site.experts.parameters(recurse=False) if len(shape := whole_shape(p)) == 3]
        self.expert_width = max(max(shape[1:]) for shape in stacked)
        # Keys, values, queries and their rotated copies of one row: bounded by the attention's projections.
        self.attention_width = 4 * max(
            self.hidden, self.heads * int(getattr(config, "head_dim", 0) or self.hidden // self.heads)
        )

    def virtual_bytes(self) -> int:
        """Bytes held for one virtual token for the whole sweep: its hidden state, its outcomes, its row of
        the table.
        """
        return self.hidden * self.element + 9 * self.top_k + 220

    def clean_bytes(self) -> int:
        """Bytes held for one clean token: hidden states, keys and values, expert outputs and replies of one layer."""
        return self.element * ((self.top_k + 10) * self.hidden + self.attention_width) + 64

    def audited_bytes(self) -> int:
        """Bytes held for one audited token: its logits and probabilities, and what computing them takes."""
        wide = max(self.element, 4)
        return 5 * wide * self.vocabulary

    def row_bytes(self, length: int) -> int:
        """Bytes of temporaries of one row of a micro-batch while a layer runs."""
        experts = self.top_k * (2 * self.hidden + 2 * self.expert_width)
        return (
            self.element * (8 * self.hidden + self.attention_width + experts)
            + 64
            + (0 if self.device == "cpu" else 3 * self.element * self.heads * length)
        )

    def gradient_bytes(self, first_layer: int) -> int:
        """Bytes kept for one clean token while gradients are computed: its keys and values from ``first_layer`` up."""
        return (self.layers - first_layer) * self.element * self.attention_width

    def given_bytes(self, first_layer: int) -> int:
        """Bytes kept for one audited token while gradients are computed: what each layer from ``first_layer`` up was
        given, and the gradient.
        """
        return (self.layers - first_layer + 1) * self.element * self.hidden

    def gradient_row_bytes(self, length: int) -> int:
        """Bytes one row of a backward holds: all it passes through in one layer, or its logits."""
        wide = max(self.element, 4)  # norms and routers work in float32
        experts = self.top_k * (2 * self.hidden + 3 * self.expert_width)
        layer = wide * (12 * self.hidden + 2 * self.attention_width + experts + 4 * self.heads * length)
        return max(layer, 4 * wide * self.vocabulary)


def default_memory(sizes: Sizes, available: int) -> int:
    """The budget where none is given, in bytes, of a device that has ``available``.

    Nine tenths of a GPU: the rest is for its driver and what an allocator cannot join. On a CPU, whose memory others
    share, the weights and 2 GiB more, or all there is.
    """
    if sizes.device != "cpu":
        return int(0.9 * available)
    return min(sizes.weights + 2 * 2**30, available)


def working_bytes(sizes: Sizes, memory: int) -> int:
    """What is left of the budget for a sweep. Raises ValueError where nothing is."""
    left = memory - sizes.weights - PROGRAM_BYTES
    smallest = 64 * 2**20
    if left < smallest:
        needed = sizes.weights + PROGRAM_BYTES + smallest
        raise ValueError(
            f"engine.memory: {memory / 2**20:,.0f} MiB do not hold the weights ({sizes.weights / 2**20:,.0f} "
            f"MiB), the program ({PROGRAM_BYTES / 2**20:,.0f} MiB) and a sweep; give at least {needed / 2**20:,.0f} MiB"
        )
    return left


def shares(
    sizes: Sizes, left: float, length: int, layers: Sequence[int], worlds: float, scope: str, attribution: bool
) -> tuple[float, float, float]:
    """How the bytes ``left`` beside a micro-batch are used: those for rows, per clean token, per audited position.

    ``worlds`` per position and layer; ``length`` of the longest sequence.
    """
    # In sequence scope worlds come and go; all clean layers stay until the sequence is done.
    held = len(layers) if scope == "token" else 4
    kept = 1 if scope == "token" else sizes.layers
    clean = sizes.clean_bytes() * kept
    audited = sizes.audited_bytes() + sizes.virtual_bytes() * worlds * held
    if attribution:  # gradients come before the sweep and take its place; what stays of them is one row per layer
        left -= sizes.gradient_row_bytes(length)
        clean += sizes.gradient_bytes(min(layers))
        audited += sizes.given_bytes(min(layers)) + len(layers) * sizes.hidden * sizes.element
    return left, clean, audited


@dataclass(frozen=True, slots=True)
class Room:
    """What one sweep holds: ``micro_batch`` rows in a layer at once, ``tokens`` audited, ``rows`` virtual tokens."""

    micro_batch: int
    tokens: int
    rows: int


def room_for(sizes: Sizes, memory: int, length: int, identity_every: int = 8) -> Room:
    """The largest sweep in ``memory`` that removes every active expert of every token of sequences of ``length``.

    Raises ValueError where the memory does not hold the weights and the smallest sweep.
    """
    micro_batch = micro_batch_for(sizes, memory, length)
    worlds, layers = sizes.top_k + 1.0 / identity_every, sorted(sizes.moe_layers)
    beside = working_bytes(sizes, memory) - micro_batch * sizes.row_bytes(length)
    left, clean, audited = shares(sizes, beside, length, layers, worlds, "token", False)
    # A sequence is there whole; of its tokens as many are audited as fit, in further sequences all of them.
    first = min(length, int((left - length * clean) // audited))
    more = int((left - length * (clean + audited)) // (length * (clean + audited)))
    tokens = min(MOST_CLEAN_ROWS // length * length, first + max(0, more) * length)
    if tokens < 1:
        raise ValueError(f"{memory / 2**20:,.0f} MiB do not hold one token of a sequence of {length}")
    return Room(micro_batch, tokens, int(tokens * worlds * len(layers)))


def micro_batch_for(sizes: Sizes, memory: int, length: int) -> int:
    """Rows that go through a layer at once: the device's best, or what a third of the working memory holds."""
    fitting = working_bytes(sizes, memory) // 3 // sizes.row_bytes(length)
    best = DEFAULT_MICRO_BATCH.get(sizes.device, DEFAULT_MICRO_BATCH["cpu"])
    return max(SMALLEST_MICRO_BATCH, min(best, int(fitting)))


def gradient_rows_for(
    sizes: Sizes, working: int, clean_rows: int, audited_rows: int, length: int, first_layer: int
) -> int:
    """Rows of one backward that fit beside what is kept of ``clean_rows`` and ``audited_rows`` tokens; at least one."""
    left = working - clean_rows * sizes.gradient_bytes(first_layer) - audited_rows * sizes.given_bytes(first_layer)
    return max(1, left // sizes.gradient_row_bytes(length))


def cost_of(
    sizes: Sizes,
    lengths: Sequence[int],
    positions: Sequence[int],
    layers: Sequence[int],
    worlds: float,
    interventions: Sequence[Intervention],
    scope: str,
    identity_every: int,
    attribution: bool = False,
    redistribution: bool = False,
) -> Cost:
    """Cost of auditing ``positions[i]`` tokens of a sequence of ``lengths[i]`` at ``layers``; ``worlds`` per
    token and layer.

    ``attribution`` adds a clean pass, and per token one virtual token from the first layer up, forwards, forwards again
    and backwards: about four times its forward. Repeats add a clean pass and a world per token and layer to one
    sequence in ``identity_every``, but no rows.
    """
    repeats = any(i.target.selection != "shared" for i in interventions) / identity_every
    rows, flops = 0.0, 0.0
    for length, audited in zip(lengths, positions, strict=True):
        per_token = [2.0 * active + 2.0 * length * sizes.hidden for active in sizes.active]
        flops += (1 + repeats) * length * sum(per_token)
        for layer in layers:
            rows += audited * (worlds + 1.0 / identity_every)
            born = audited * (worlds + 1.0 / identity_every + repeats)
            # In sequence scope a world is the whole sequence again, whatever is read of it.
            whole = _sequence_worlds(sizes, length, worlds, interventions) + repeats
            carried = born if scope == "token" else whole * length
            flops += carried * sum(per_token[layer:]) + born * 2.0 * sizes.hidden * sizes.vocabulary
        if attribution and layers:
            row = 4.0 * sum(per_token[min(layers) :]) + 3.0 * 2.0 * sizes.hidden * sizes.vocabulary
            flops += length * sum(per_token) + audited * row
    size = BYTES_PER_EFFECT + BYTES_PER_FLOAT * (attribution + 4 * redistribution)
    return Cost(round(rows), flops, round(rows) * size)


def _sequence_worlds(sizes: Sizes, length: int, worlds: float, interventions: Sequence[Intervention]) -> float:
    """Worlds per layer of one sequence: every expert that is active somewhere, at most those there are slots for."""
    return min(length * worlds, sum(64.0 if i.target.selection == "each" else 1.0 for i in interventions)) + 1.0


def _active_parameters(model: Sized, layer: int) -> int:
    total = _elements(model.layers[layer])
    site = model.sites.get(layer)
    if site is None:
        return total
    experts = _elements(site.experts)
    return total - experts + experts * model.description.top_k // site.num_experts


def _elements(module: nn.Module) -> int:
    return sum(math.prod(whole_shape(p)) for p in module.parameters())
