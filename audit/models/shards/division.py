"""Load a model of which every rank keeps a share: rank 0 reads the checkpoint, and layer by layer all take theirs.

Rank 0 alone needs host memory for the whole checkpoint; a device holds what lies outside the decoder layers, the
shares taken so far and one whole layer. Data types are those that rank 0 read, tensor by tensor: what a family keeps in
float32 stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from audit.models.discovery import ModelError, decoder_layers
from audit.models.seam import LayerCall, first_tensor, record_calls
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.sources import Reading, first_sentence

_PROBE_ROWS = 16
_OUTSIDE = -1  # in place of a layer's number
T = TypeVar("T")


class Member(Protocol):
    """One of the processes that hold a model together."""

    rank: int
    ranks: int
    control: dist.ProcessGroup | None  # of all ranks, for small messages between hosts (gloo); None where there is one


class Divider(Member, Protocol):
    """A back end that keeps a share of every decoder layer."""

    def divide(self, number: int, layer: nn.Module, output: Callable[[], Tensor]) -> None:
        """Keep this rank's share of the layer, which is whole on this rank's device, and drop the rest.

        ``output`` gives what the layer, as it is then, makes of a fixed probe [R, D]. All ranks call it together.
        """

    def visit(self, layer: int) -> AbstractContextManager[None]: ...

    def task(self) -> AbstractContextManager[None]: ...


def load_divided(reading: Reading, shard: Divider, inspect: Inspect | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint, divided over the ranks of ``shard``, and its tokenizer, on every rank.

    All ranks call it together; rank 0 calls ``inspect`` with the model before it is divided. Raises ModelError on every
    rank where one of them cannot go on.
    """

    def read() -> tuple[Any, Any, torch.device]:
        tokenizer, place = reading.tokenizer(), reading.place
        if shard.rank:
            return reading.skeleton(), tokenizer, place
        module = reading.module()
        if inspect is not None:
            inspect(module, decoder_layers(module), ModelShard())
        return module, tokenizer, place

    module, tokenizer, place = agreed(shard, read)
    return divide_module(module, shard, place), tokenizer


def skeleton(config: Any, **options: Any) -> Any:
    """The model of a configuration without values, for the ranks that read no checkpoint."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def divide_module(module: Any, shard: Divider, device: torch.device) -> Any:
    """Divide ``module`` over the ranks: rank 0's holds the values, the others' is a :func:`skeleton`.

    All ranks call it together. Raises ModelError on every rank where the models differ, where one of them cannot take
    its share, or where a divided layer computes something else than it did when it was whole.
    """
    module = module.eval().requires_grad_(False)
    layers = decoder_layers(module)
    prefix = next(name for name, child in module.named_modules() if child is layers) + "."
    told: list[_Told] = _from_rank_0(shard, _tensors(module) if shard.rank == 0 else None)
    agreed(shard, lambda: _require_same(_tensors(module), told))
    parts = agreed(shard, lambda: _parts(told, prefix))

    _fetch(module, parts.pop(_OUTSIDE, []), shard, device)
    calls = agreed(shard, lambda: _probe_calls(module, layers, device))
    hidden = calls[0].hidden
    for number, layer in enumerate(layers):
        _fetch(module, parts[number], shard, device)
        hidden = agreed(shard, lambda: _divide_layer(number, layer, shard, calls[number], hidden))  # noqa: B023
    return module


def agreed(shard: Member, work: Callable[[], T]) -> T:
    """What ``work`` gives, once it is done on every rank.

    An error of one rank is a ModelError on those that had none, instead of a wait without end.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if shard.ranks > 1:
        text = None if error is None else str(error) if isinstance(error, ModelError) else first_sentence(error)
        texts: list[str | None] = [None] * shard.ranks
        dist.all_gather_object(texts, text, group=shard.control)
        if error is None and (failed := [i for i, text in enumerate(texts) if text is not None]):
            raise ModelError(f"{texts[failed[0]]} (rank {failed[0]})")
    if error is not None:
        raise error
    return result


def distance(divided: Tensor, whole: Tensor) -> float:
    """How far a divided layer's output lies from that of the whole one, relative to its largest value."""
    apart_R = (divided.double() - whole.double()).abs().amax(-1) / whole.double().abs().max().clamp_min(1e-30)
    # In half precision a sum in another order may route a row otherwise, which is no fault of the division.
    return float(apart_R.max() if whole.dtype in (torch.float32, torch.float64) else apart_R.quantile(0.75))


def tolerance(dtype: torch.dtype) -> float:
    """The largest :func:`distance` that rounding explains."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)


@dataclass(frozen=True, slots=True)
class _Told:
    """One tensor of rank 0's model."""

    name: str
    parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    same_as: str | None  # the name of an earlier one that it is tied to


def _tensors(module: nn.Module) -> list[_Told]:
    first: dict[int, str] = {}
    found: list[_Told] = []
    for parameter, named in (
        (True, module.named_parameters(remove_duplicate=False)),
        (False, module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            same = first.setdefault(id(tensor), name)
            found.append(_Told(name, parameter, tuple(tensor.shape), tensor.dtype, None if same == name else same))
    return found


def _require_same(ours: list[_Told], told: list[_Told]) -> None:
    mine, theirs = ({(t.name, t.shape) for t in tensors} for tensors in (ours, told))
    if mine != theirs:
        name, shape = min(mine ^ theirs)
        raise ModelError(
            f"model.source: the ranks read different models, {name} {list(shape)} is not in all of them; every rank "
            "needs the same checkpoint"
        )


def _from_rank_0(shard: Divider, value: Any) -> Any:
    if shard.ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=shard.control)
    return box[0]


def _parts(told: Sequence[_Told], prefix: str) -> dict[int, list[_Told]]:
    """The tensors of every layer, by its number, and of what lies outside the layers."""

    def part(name: str) -> int:
        return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else _OUTSIDE

    parts: dict[int, list[_Told]] = {}
    for t in told:
        if t.same_as is not None and part(t.same_as) != part(t.name):
            raise ModelError(
                f"model.backend: {t.same_as} and {t.name} are one tensor, and layers that share weights cannot be "
                "divided; use single"
            )
        parts.setdefault(part(t.name), []).append(t)
    return parts


def _fetch(module: nn.Module, told: Sequence[_Told], shard: Divider, device: torch.device) -> None:
    """Bring rank 0's values of these tensors to the device of every rank. All ranks call it together."""

    def place() -> dict[str, Tensor]:
        placed: dict[str, Tensor] = {}
        for t in told:
            if t.same_as is not None:
                placed[t.name] = placed[t.same_as]
                continue
            if shard.rank == 0:
                owner, _, name = t.name.rpartition(".")
                value = getattr(module.get_submodule(owner), name).detach().to(device).contiguous()
            else:
                value = torch.empty(t.shape, dtype=t.dtype, device=device)
            placed[t.name] = nn.Parameter(value, requires_grad=False) if t.parameter else value
        return placed

    placed = agreed(shard, place)  # a rank without room must say so before the others wait for it
    for t in told:
        value = placed[t.name]
        if shard.ranks > 1 and value.numel() and t.same_as is None:
            dist.broadcast(value.detach().view(-1).view(torch.uint8), 0)  # bytes: gloo does not know every data type
        owner, _, name = t.name.rpartition(".")
        holder = module.get_submodule(owner)
        (holder._parameters if t.parameter else holder._buffers)[name] = value  # type: ignore[assignment]


def _probe_calls(module: nn.Module, layers: nn.ModuleList, device: torch.device) -> list[LayerCall]:
    """What every layer is called with for a few made-up tokens."""
    vocabulary = int(module.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.randint(0, vocabulary, (1, _PROBE_ROWS), generator=torch.Generator().manual_seed(0))
    return record_calls(module, layers, ids.to(device))


def _divide_layer(number: int, layer: nn.Module, shard: Divider, call: LayerCall, hidden: Tensor) -> Tensor:
    """Take this rank's share of one layer; returns the whole layer's output for the probe, the next one's input."""
    mask = {} if call.mask is None else {"attention_mask": call.mask}

    @torch.inference_mode()
    def output() -> Tensor:
        return first_tensor(layer(hidden, *call.args, **mask, **call.kwargs))

    whole = agreed(shard, output)  # dividing is done together: a rank that had no memory for it must say so before
    shard.divide(number, layer, lambda: output()[0])
    with shard.task(), shard.visit(number):
        apart = distance(output(), whole)
    if not apart <= tolerance(whole.dtype):
        raise ModelError(
            f"model.backend: layer {number} of this family computes something else when it is divided ({apart:.1e} "
            "apart, relative to its largest value); name another back end"
        )
    return whole
