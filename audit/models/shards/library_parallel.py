"""Back end ``transformers_tp``: transformers' own tensor parallelism, for comparison with ``deepspeed_tp``.

The library reads every rank's share from the checkpoint, so no host needs room for the whole, and no layer is ever
whole on a rank: there is nothing to compare a divided layer with. Its sums tell nobody what they add up. Plans are
compared before every sweep all the same; but where one rank fails in mid-sweep the others wait in the library's sum
until the group's time limit ends them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from audit.models.discovery import decoder_layers
from audit.models.shards.division import agreed
from audit.models.shards.meeting import meet
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.shards.together import SharingShard
from audit.models.sources import Reading


class TransformersParallel(SharingShard):
    """The ranks have met in torch's process group. ``timeout``: how long a rank waits for another one's words."""

    backend = "transformers_tp"

    def __init__(self, rank: int, ranks: int, *, device: torch.device, timeout: timedelta | None = None) -> None:
        self.control = meet(rank, ranks, device, timeout)
        # Words never share a group with the library's sums, which would take them for numbers.
        super().__init__(rank, ranks, dist.new_group(backend="gloo", timeout=timeout))

    def weight_bytes(self, layers: nn.ModuleList, module: nn.Module) -> int:
        held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
        return sum(p.numel() * p.element_size() for p in held)


def load_parallel(reading: Reading, shard: TransformersParallel, inspect: Inspect | None = None) -> tuple[Any, Any]:
    """This rank's share of a checkpoint's model, and the tokenizer.

    All ranks call it together. For ``inspect`` rank 0 reads the model once more, whole, before. Raises ModelError where
    the library cannot divide the family, or a name is unknown.
    """
    if inspect is not None:
        agreed(shard, lambda: _show_whole(reading, inspect) if shard.rank == 0 else None)
    module = reading.module(distributed_config=DistributedConfig(tp_size=shard.ranks))
    return module.to(reading.place), reading.tokenizer()  # one rank's the library leaves where it read it


def _show_whole(reading: Reading, inspect: Inspect) -> None:
    module = reading.module()
    inspect(module, decoder_layers(module), ModelShard())
