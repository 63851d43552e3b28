"""What the processes that hold a model run on: their device's memory, their host's, and a folder on its disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from audit.models.discovery import ModelError
from audit.models.sources import resolve_device

NO_FOLDER = "model.offload: 'nvme' needs model.offload_folder, which is not given; name a folder on a local disk"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the ranks of a group run on. ``memory``: bytes of one device; ``host``: of the host that all ranks share.

    On ``cpu`` the host is the device: ``memory`` is one rank's part of it.
    """

    device: Literal["cpu", "cuda"]
    memory: int
    host: int


def machine_of(device: torch.device, ranks: int = 1) -> Machine:
    """This machine, for the ``ranks`` processes of one group. Raises ModelError where the device is absent."""
    host = host_memory()
    if device.type != "cuda":
        return Machine("cpu", host // ranks, host)
    return Machine("cuda", int(torch.cuda.get_device_properties(resolve_device(str(device))).total_memory), host)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's memory, or less where a control group limits it (a container).

    ``root``: where the kernel's files are found.
    """
    found = [int(psutil.virtual_memory().total)]
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:  # version 2 has one hierarchy for all
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):  # a limit holds for all groups within; a container may see its own only
            try:
                limit = (base / folder / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if limit.isdigit():  # "max" where there is none
                found.append(int(limit))
    return min(found)


def local_folder(folder: str | None) -> Path:
    """The folder behind ``model.offload_folder``. Raises ModelError where layers cannot be kept in it."""
    if folder is None:
        raise ModelError(NO_FOLDER)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelError(f"model.offload_folder: {folder!r} does not exist; name a folder on a local disk")
    if not os.access(path, os.W_OK):
        raise ModelError(f"model.offload_folder: {folder!r} cannot be written to; name a folder that can")
    return path
