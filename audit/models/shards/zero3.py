"""DeepSpeed ZeRO-3: every rank keeps 1/ranks of each decoder layer, and has a layer whole while it is visited.

Ranks carry tasks of their own (:mod:`audit.models.shards.lockstep`). DeepSpeed partitions, offloads and gathers; its
engine and its module hooks are not used, for a layer is gathered once for all that a sweep does with it. What is
gathered has the very bits of what was divided, so effects are those of a model that is whole.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from audit.models.discovery import ModelError, whole_shape
from audit.models.memory import Offload
from audit.models.shards.division import agreed
from audit.models.shards.lockstep import Lockstep
from audit.models.shards.machine import local_folder
from audit.models.shards.meeting import import_deepspeed, meet
from audit.models.shards.shard import ModelShard
from audit.models.sources import first_sentence

# DeepSpeed keeps a pinned buffer of the largest one's size per parameter on NVMe; those smaller than this part of the
# layer's largest stay in host memory instead.
_LARGE = 1 / 16


class DeepSpeedZero3(ModelShard):
    """Shares of every layer on ``device``, in host memory (``offload="cpu"``) or in files (``"nvme"``).

    ``folder``: where those files go, of this process alone, removed when it ends. ``timeout``: how long a rank waits
    for the others. Several ranks must have met by ``torch.distributed``; one rank needs no group. Raises ModelError on
    every rank where the offload is not possible on one of them.
    """

    backend = "deepspeed_zero3"

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 1,
        *,
        device: torch.device,
        offload: Offload = "none",
        folder: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(rank, ranks)
        self.control = meet(rank, ranks, device, timeout)
        self._deepspeed = import_deepspeed(device)
        self._device, self._offload, self._folder = device, offload, folder
        agreed(self, lambda: _require_offload(offload, folder))
        self._layers: dict[int, list[nn.Parameter]] = {}
        self._room: list[int] = []  # bytes of each tensor of the layer that takes most while it is gathered
        self._gathered: Any = None
        self._swappers: dict[tuple[torch.dtype, int, int], _Swapper] = {}
        self._lockstep = Lockstep(self._exchange, self._fetch, self._release, self._make_room)

    def visit(self, layer: int) -> AbstractContextManager[None]:
        return self._lockstep.visit(layer)

    def task(self) -> AbstractContextManager[None]:
        return self._lockstep.task()

    def weight_bytes(self, layers: nn.ModuleList, module: nn.Module) -> int:
        """Bytes of what is outside the layers, of the shares where they are not elsewhere, and of one whole layer."""
        inside = {id(p) for p in layers.parameters()}
        outside = sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in inside)
        buffers = sum(b.numel() * b.element_size() for b in layers.buffers())
        shares = sum(self._share(p) for p in layers.parameters() if self._is_here(p))
        return outside + buffers + shares + sum(self._room)

    @torch.inference_mode(False)
    @torch.no_grad()
    def divide(self, number: int, layer: nn.Module, output: Callable[[], Tensor]) -> None:
        """Keep this rank's share of the layer (:class:`audit.models.shards.division.Divider`)."""
        parameters = list(layer.parameters())
        if self._offload == "nvme":
            self._to_files(layer, parameters)
        device = "none" if self._offload == "none" else "cpu"
        # What is partitioned already is left as it is. The data type is that of what DeepSpeed would make, not of what
        # it is given: half precision would make it convert buffers.
        self._deepspeed.zero.Init(module=layer, config_dict_or_path=self._config(device), dtype=torch.float32)
        self._layers[number] = parameters
        room = [_bytes(p) for p in parameters]
        if self._offload != "none" and self._device.type != "cpu":
            room += [self._share(p) for p in parameters]  # on its way through the device
        self._room = max(self._room, room, key=sum)

    def _to_files(self, layer: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        large = [p for p in parameters if p.numel() >= _LARGE * max(q.numel() for q in parameters)]
        for dtype in {p.dtype for p in large}:
            these = [p for p in large if p.dtype == dtype]
            key = (dtype, max(-(-p.numel() // self.ranks) for p in these), len(these))
            if key not in self._swappers:
                assert self._folder is not None
                self._swappers[key] = _Swapper(self._deepspeed, self._config, self._folder, *key)
            swapper = self._swappers[key]
            holder = nn.ParameterList(these)
            self._deepspeed.zero.Init(
                module=holder, config_dict_or_path=swapper.config, dtype=dtype, param_swapper=swapper.swapper
            )

    def _config(self, device: str, **offload: Any) -> dict[str, Any]:
        # Pinned shares would be faster to bring, but each takes the next power of two of bytes.
        pinned = self._device.type == "cuda" and device == "nvme"
        elsewhere: dict[str, Any] = {"device": device, "pin_memory": pinned, **offload}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,  # small parameters too are kept in shares
                "memory_efficient_linear": False,  # it would exchange torch's linear in the whole process, and its bits
                **({} if device == "none" else {"offload_param": elsewhere}),
            },
        }

    def _share(self, parameter: nn.Parameter) -> int:
        return -(-_bytes(parameter) // self.ranks)

    def _is_here(self, parameter: Any) -> bool:
        share = parameter.ds_tensor
        return share.device.type == self._device.type and share.final_location is None  # else in a file

    # ---- what the lock-step asks for --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def _exchange(self, wanted: int) -> list[int]:
        if self.ranks == 1:
            return [wanted]
        answers = [torch.empty(1, dtype=torch.long) for _ in range(self.ranks)]
        dist.all_gather(answers, torch.tensor([wanted]), group=self.control)
        return [int(answer) for answer in answers]

    def _make_room(self) -> None:
        """Run out of memory here, alone, rather than in the midst of a gather: what is freed stays with the allocator.

        A host's allocator grants memory that it does not have; there is nothing to ask it for.
        """
        if self._device.type != "cpu":
            room = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._room]
            del room

    # Not in inference mode: a gradient may pass through what is gathered.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _fetch(self, layer: int) -> None:
        # One collective per tensor, all begun before the first is waited for, each into the place where it is used.
        # Joined in a single one they would have to be copied apart, which takes twice the memory.
        gathered = self._deepspeed.zero.GatheredParameters(self._layers[layer])
        gathered.__enter__()
        self._gathered = gathered
        self.gathers[layer] = self.gathers.get(layer, 0) + 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def _release(self, layer: int) -> None:
        gathered, self._gathered = self._gathered, None
        gathered.__exit__(None, None, None)


class _Swapper:
    """DeepSpeed's reader and writer of files, for parameters of one type up to one size, a number of them at a time."""

    def __init__(
        self,
        deepspeed: Any,
        config: Callable[..., dict[str, Any]],
        folder: str,
        dtype: torch.dtype,
        largest: int,
        count: int,
    ) -> None:
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (  # noqa: PLC0415 -- needs libaio
            AsyncPartitionedParameterSwapper,
        )

        self._folder = tempfile.TemporaryDirectory(prefix="moe-audit-", dir=folder)  # DeepSpeed empties what it finds
        self.config = config("nvme", nvme_path=self._folder.name, buffer_count=count, buffer_size=largest)
        self.swapper = AsyncPartitionedParameterSwapper(deepspeed.DeepSpeedConfig(self.config), dtype)


def _bytes(parameter: nn.Parameter) -> int:
    return math.prod(whole_shape(parameter)) * parameter.element_size()


def _require_offload(offload: Offload, folder: str | None) -> None:
    if offload != "nvme":
        return
    local_folder(folder)
    from deepspeed.ops.op_builder import AsyncIOBuilder  # noqa: PLC0415 -- only this offload needs it

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ModelError(
            "model.offload: nvme needs libaio, which is not installed here; install it (apt-get install libaio-dev) or "
            "take cpu"
        )
    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError, TypeError) as error:  # the last two where the CUDA toolkit is missing
        raise ModelError(
            f"model.offload: nvme needs DeepSpeed's asynchronous reads, which cannot be built here "
            f"({first_sentence(error)}); install ninja, a C++ compiler and with a GPU the CUDA toolkit, or take cpu"
        ) from error
