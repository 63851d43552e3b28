"""Back end ``deepspeed_tp``: every rank holds some heads and some experts of every layer, and all run the same task.

Attention, dense feed-forward parts and shared experts are divided by DeepSpeed's AutoTP from an explicit list of which
linear maps are divided by rows and which by columns; routed experts, which AutoTP leaves whole, by
:mod:`audit.models.shards.expert_slices`. What the ranks add up goes through :mod:`audit.models.shards.together`. A part
that computes something else once it is divided, forwards or backwards, stays whole on every rank, with a note.

Embedding, norms, routers and head are whole on every rank.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from audit.models.discovery import ModelError, is_experts
from audit.models.seam import first_tensor, map_tensors, replaced, tensors_in
from audit.models.shards.division import distance, tolerance
from audit.models.shards.errors import out_of_memory
from audit.models.shards.expert_slices import DividedExperts, note_shape
from audit.models.shards.meeting import import_deepspeed, meet
from audit.models.shards.together import SharingShard, Together
from audit.models.sources import first_sentence

# Linear maps by the names that transformers uses. What stands in neither list is whole: routers, low-rank projections.
_HEADS_OUT = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
_COLUMNS = (*_HEADS_OUT, "gate_proj", "up_proj", "w1", "w3")
_ROWS = ("o_proj", "out_proj", "down_proj", "w2")

# What a part was given.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _StaysWholeError(ValueError):
    """The reason, as a clause."""


class DeepSpeedTensorParallel(SharingShard):
    """The ranks have met in torch's process group. ``timeout``: how long a rank waits for another one's words where
    that group speaks for GPUs; None: as long as torch does by default.
    """

    backend = "deepspeed_tp"

    def __init__(self, rank: int, ranks: int, *, device: torch.device, timeout: timedelta | None = None) -> None:
        self.control = meet(rank, ranks, device, timeout)
        super().__init__(rank, ranks, self.control)
        self._whole: dict[str, list[tuple[int, str]]] = {}  # part: the layers where it stays whole, and why
        self._most = 0  # bytes of the layers on the rank that has most of each
        import_deepspeed(device)

    def notes(self) -> list[str]:
        return [
            f"{part} is whole on every rank in {len(layers)} layers, {layers[0][0]} the first: {layers[0][1]}"
            for part, layers in self._whole.items()
        ]

    def weight_bytes(self, layers: nn.ModuleList, module: nn.Module) -> int:
        """Bytes on the rank that holds most: by them sweeps are cut, which all ranks must cut alike."""
        if self.ranks == 1:
            return super().weight_bytes(layers, module)
        return super().weight_bytes(layers, module) - _bytes(layers) + self._most

    def divide(self, number: int, layer: nn.Module, output: Callable[[], Tensor]) -> None:
        """Keep this rank's share of the layer. All ranks call it together; ``output`` runs the layer on a probe.

        Raises ModelError on every rank where its routed experts cannot be divided.
        """
        if self.ranks == 1:
            return
        with self.task():
            calls = _calls_of_parts(layer, output)
        for path, call in calls.items():
            divide = self._divide_experts if is_experts(layer.get_submodule(path)) else self._divide_part
            divide(number, layer, path, call)
        held_R = torch.zeros(self.ranks, dtype=torch.float64, device=next(layer.parameters()).device)
        held_R[self.rank] = _bytes(layer)
        self._most += int(self._together.sum(held_R, f"the bytes of layer {number}").max())

    def _divide_part(self, number: int, layer: nn.Module, path: str, call: _Call) -> None:
        whole = layer.get_submodule(path)
        try:
            with self.task():  # one rank's refusal is everyone's
                divided = _divided(whole, path, self.rank, self.ranks)
                if divided is None:
                    return
                expected = _there_and_back(whole, call)
                _add_up(divided, self._together, f"layer {number} {path}")
                _require_equal(_there_and_back(divided, call), expected)
        except Exception as error:
            if out_of_memory(error):  # whole it would take more
                raise
            reason = first_sentence(error)
            if not isinstance(error, _StaysWholeError):
                reason = f"divided, it does not run ({type(error).__name__}: {reason})"
            self._whole.setdefault(path, []).append((number, reason))
            return
        _put(layer, path, divided)

    def _divide_experts(self, number: int, layer: nn.Module, path: str, call: _Call) -> None:
        whole = layer.get_submodule(path)
        stacked = next(p for p in whole.parameters(recurse=False) if p.dim() == 3)
        num_experts = int(getattr(whole, "num_experts", stacked.shape[0]))
        if self.ranks > num_experts:
            raise ModelError(
                f"cluster.ranks: {self.ranks} is more than the {num_experts} experts of layer {number}; use at most "
                f"{num_experts}"
            )
        try:
            with self.task():
                call = _reaching_all(call, whole, num_experts)
                expected = _there_and_back(whole, call)
                divided = DividedExperts(whole, num_experts, self.ranks, self._together, f"layer {number} {path}")
                _require_equal(_there_and_back(divided, call), expected)
        except Exception as error:
            raise ModelError(
                f"model.backend: the experts of layer {number} cannot be divided over {self.ranks} ranks "
                f"({first_sentence(error)}); use deepspeed_zero3"
            ) from error
        _put(layer, path, divided)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _calls_of_parts(layer: nn.Module, output: Callable[[], Tensor]) -> dict[str, _Call]:
    """What every part of the layer is given: attention, feed-forward, shared and routed experts."""
    paths: list[str] = []

    def collect(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if is_experts(child) or (
                any(isinstance(m, nn.Linear) for m in child.children())
                and not any(is_experts(m) for m in child.modules())
            ):
                paths.append(f"{prefix}{name}")
            else:
                collect(child, f"{prefix}{name}.")

    collect(layer, "")
    calls: dict[str, _Call] = {}

    def recording(path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[path] = (args, kwargs)
            return own(*args, **kwargs)

        return forward

    with replaced({layer.get_submodule(path): recording(path, layer.get_submodule(path).forward) for path in paths}):
        output()
    return calls


def _divided(whole: nn.Module, path: str, rank: int, ranks: int) -> nn.Module | None:
    """A copy of the part with this rank's share of its linear maps; None where it has one alone, such as a gate.

    Raises _StaysWholeError where it cannot be divided.
    """
    from deepspeed.module_inject.auto_tp import AutoTP  # noqa: PLC0415
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec  # noqa: PLC0415

    linears = {name.rpartition(".")[2] for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    if len(linears) < 2:
        return None
    if not linears & set(_COLUMNS) or not linears & set(_ROWS):
        raise _StaysWholeError(f"none of its linear maps {', '.join(sorted(linears))} is known to be divided")
    config: Any = next(iter(_configurations(whole)), None)
    heads = linears & set(_HEADS_OUT)
    if heads:
        query, key = config.num_attention_heads, config.num_key_value_heads
        if query % ranks or key % ranks:
            raise _StaysWholeError(f"its {query} heads, {key} of them for keys, cannot be divided by {ranks}")
    specs = [
        TPLayerSpec([rf".*\.({'|'.join(_ROWS)})\.weight$"], PartitionType.ROW),
        TPLayerSpec([rf".*\.({'|'.join(_COLUMNS)})\.weight$"], PartitionType.COLUMN),
    ]
    holder = nn.Module()
    name = path.rpartition(".")[2]
    holder.add_module(name, _copied(whole))
    auto = AutoTP(
        holder,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=None,
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=ranks, layer_specs=specs),
        model_config=config if heads else None,  # it divides by heads where it knows how many there are
    )
    auto.set_tensor_parallel_config(ranks, dist.group.WORLD)
    auto.update_linear_policies()
    auto._replace_module(holder)
    divided = holder.get_submodule(name)
    if heads:
        _divide_per_head(divided, config.num_attention_heads, rank, ranks)
    device = next(whole.parameters()).device
    return divided.to(device)


def _copied(whole: nn.Module) -> nn.Module:
    """A copy that shares the configuration, through which a model's attention is chosen."""
    return copy.deepcopy(whole, {id(config): config for config in _configurations(whole)})


def _configurations(part: nn.Module) -> list[PretrainedConfig]:
    return [value for m in part.modules() for value in vars(m).values() if isinstance(value, PretrainedConfig)]


def _divide_per_head(attention: nn.Module, heads: int, rank: int, ranks: int) -> None:
    """What AutoTP does not know: a number for every head, such as gpt-oss's sinks."""
    share = heads // ranks
    for name, parameter in list(attention.named_parameters(recurse=False)):
        if parameter.shape == (heads,):
            cut = nn.Parameter(parameter.detach()[rank * share : (rank + 1) * share].clone(), requires_grad=False)
            setattr(attention, name, note_shape(cut, parameter.shape))


def _add_up(divided: nn.Module, together: Together, name: str) -> None:
    """Replace DeepSpeed's communication by steps that the ranks tell each other of.

    Gradients are added up where the part begins, and not before every linear map: between those may stand what each
    rank computes for itself from all of it, such as the rotary keys that multi-head latent attention has in common.
    """
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, TensorParallel_Layer  # noqa: PLC0415

    for path, module in divided.named_modules():
        if not isinstance(module, TensorParallel_Layer):
            continue
        if type(module) not in (LinearAllreduce, LinearLayer):
            raise _StaysWholeError(f"DeepSpeed divides {path} in a way that the audit does not know")
        by_rows = type(module) is LinearAllreduce
        module.__dict__["forward"] = (
            partial(_by_rows, module, together, f"{name}.{path}") if by_rows else partial(_by_columns, module)
        )
        note_shape(module.weight, module._orig_weight_shape)
        if module.bias is not None and not by_rows:
            note_shape(module.bias, module._orig_bias_shape)
    own = divided.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        enter = partial(together.enter, name=name)
        return own(*map_tensors(args, enter), **map_tensors(kwargs, enter))

    divided.__dict__["forward"] = forward


def _by_rows(module: Any, together: Together, name: str, x: Tensor) -> Tensor:
    summed = together.sum(F.linear(x, module.weight), name)
    return summed if module.bias is None else summed + module.bias


def _by_columns(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _reaching_all(call: _Call, whole: nn.Module, num_experts: int) -> _Call:
    """What the experts are given for a probe, with a routing that reaches every one of them."""
    names = list(inspect.signature(type(whole).forward).parameters)[1:]
    args, kwargs = call
    x_ND, index_NK, weights_NK = (*args, *(kwargs[name] for name in names[len(args) :]))
    rows, K = max(len(x_ND), num_experts), index_NK.shape[1]
    place_N = torch.arange(rows, device=x_ND.device)
    reaching_NK = (place_N[:, None] + torch.arange(K, device=x_ND.device)) % num_experts
    weights = torch.rand(rows, K, generator=torch.Generator().manual_seed(0)).to(weights_NK)
    return (x_ND[place_N % len(x_ND)], reaching_NK.to(index_NK.dtype), weights), {}


def _there_and_back(part: nn.Module, call: _Call) -> tuple[Tensor, Tensor]:
    """The part's output for the probe [R, D], and the gradient of a fixed sum of it at its input [R, D]."""
    with torch.inference_mode(False), torch.enable_grad():
        args, kwargs = map_tensors(call, torch.clone)  # what inference mode made takes no gradient
        x = next(t for t in tensors_in([args, kwargs]) if t.is_floating_point()).requires_grad_()
        output = first_tensor(part(*args, **kwargs))
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        (gradient,) = torch.autograd.grad(output, x, direction)
    return output.detach().flatten(0, -2), gradient.flatten(0, -2)


def _require_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, whole, what in zip(found, expected, ("outputs", "gradients"), strict=True):
        apart = distance(ours, whole)
        # Backwards through a norm float64 is rounded to float32 after the shares were taken, not before.
        if not apart <= (max(tolerance(whole.dtype), 1e-6) if what == "gradients" else tolerance(whole.dtype)):
            raise _StaysWholeError(f"its {what} differ by {apart:.1e} from those of the whole")


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module.eval())
