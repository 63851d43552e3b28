"""How the ranks of a group find each other, and DeepSpeed them."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def meet(rank: int, ranks: int, device: torch.device, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """The group for small messages between hosts; None for one rank, of which a world is made."""
    if not dist.is_initialized():
        assert ranks == 1, "several ranks meet before they load a model"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    assert (dist.get_rank(), dist.get_world_size()) == (rank, ranks), "a model is divided over all ranks that have met"
    if ranks == 1:
        return None
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which knows the ranks that have met."""
    # Looked at when DeepSpeed is imported and when it partitions.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed  # noqa: PLC0415 -- slow, and it looks for devices

    if device.type == "cpu":
        # Its all-reduce in shared memory wants a compiler, crashes where LOCAL_SIZE is not set, and leaves 66 MiB of
        # /dev/shm behind per rank and run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
