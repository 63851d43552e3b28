"""The back ends by name."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from audit.models.memory import Backend, Offload
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.sources import Reading


def open_shard(
    backend: Backend,
    device: torch.device,
    *,
    rank: int = 0,
    ranks: int = 1,
    offload: Offload = "none",
    folder: str | None = None,
    seconds: float | None = None,
) -> ModelShard:
    """How this process will hold a model. Ranks that hold it together have met in torch's process group before.

    ``seconds``: how long a rank waits for the others; None: as long as that group says.

    Raises ModelError where this machine cannot hold one so.
    """
    timeout = None if seconds is None else timedelta(seconds=seconds)
    match backend:  # the libraries are loaded where they are used
        case "single":
            return ModelShard()
        case "accelerate":
            from audit.models.shards.offloaded import Offloaded  # noqa: PLC0415

            return Offloaded(offload, folder)
        case "deepspeed_zero3":
            from audit.models.shards.zero3 import DeepSpeedZero3  # noqa: PLC0415

            return DeepSpeedZero3(rank, ranks, device=device, offload=offload, folder=folder, timeout=timeout)
        case "deepspeed_tp":
            from audit.models.shards.tensor_parallel import DeepSpeedTensorParallel  # noqa: PLC0415

            return DeepSpeedTensorParallel(rank, ranks, device=device, timeout=timeout)
        case "transformers_tp":
            from audit.models.shards.library_parallel import TransformersParallel  # noqa: PLC0415

            return TransformersParallel(rank, ranks, device=device, timeout=timeout)


def load_onto(reading: Reading, shard: Any, inspect: Inspect | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint as ``shard`` holds it, and its tokenizer. Raises ModelError."""
    if shard.backend == "transformers_tp":
        from audit.models.shards.library_parallel import load_parallel  # noqa: PLC0415

        return load_parallel(reading, shard, inspect)
    if shard.traits.divided:
        from audit.models.shards.division import load_divided  # noqa: PLC0415

        return load_divided(reading, shard, inspect)
    from audit.models.shards.offloaded import load_offloaded  # noqa: PLC0415

    return load_offloaded(reading, shard, inspect)
