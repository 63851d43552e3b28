"""Which back end is chosen for what sizes, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import config_of

from audit.models.catalogue import named_model, names
from audit.models.discovery import ModelError
from audit.models.memory import LayerWeights, Weights, weights_of
from audit.models.outline import configuration_of, outline
from audit.models.shards.choose import choose, ranks_needed, why_undivided
from audit.models.shards.machine import Machine, host_memory, local_folder, machine_of

GIB = 2**30
# 100 GiB: 4 outside, 8 layers of 12, of which 10 are experts.
MODEL = Weights(2 * GIB, 2 * GIB, 0, (LayerWeights(GIB, 10 * GIB, GIB, 0),) * 8, experts=8)


def on(memory: float, host: float = 1000, device: Any = "cuda") -> Machine:
    return Machine(device, int(memory * GIB), int(host * GIB))


@pytest.mark.parametrize(
    ("memory", "host", "ranks", "expected"),
    [
        (120, 1000, 1, ("single", "none")),
        (119, 1000, 1, ("accelerate", "cpu")),
        (80, 1000, 2, ("deepspeed_tp", "none")),  # 4 + 8 * (1 + 1 + 5) = 60, and a fifth more
        (71, 1000, 2, ("deepspeed_zero3", "cpu")),  # 4 + 12 + 48 = 64 and a fifth more is too much as well
        (30, 1000, 4, ("deepspeed_zero3", "cpu")),
        (
            62,
            1000,
            3,
            ("deepspeed_tp", "none"),
        ),  # one rank has 3 of 8 experts: 4 + 8 * (1 + 1 + 3.75) = 50, and a layer
        (61, 1000, 3, ("deepspeed_zero3", "none")),  # 4 + 12 + 32 = 48
        (40, 1000, 16, ("deepspeed_zero3", "none")),  # more ranks than experts
    ],
)
def test_the_fastest_that_fits_is_chosen(memory: float, host: float, ranks: int, expected: tuple[str, str]) -> None:
    found = choose(MODEL, on(memory, host), ranks=ranks)
    assert (found.backend, found.offload, found.ranks) == (*expected, ranks)
    assert found.share.device * 1.2 <= memory * GIB
    assert found.reason.startswith(found.backend)


def test_disk_is_taken_last_and_only_where_it_may_be() -> None:
    with pytest.raises(ModelError, match=r"needs 100.0 GiB of the host's 50.0 GiB.*use hosts with at least 100.0 GiB"):
        choose(MODEL, on(24, host=50))
    found = choose(MODEL, on(24, host=50), disk=True)
    assert (found.backend, found.offload, found.share.disk) == ("accelerate", "nvme", 80 * GIB)
    assert "on disk" in found.reason
    assert choose(MODEL, on(24), disk=True).offload == "cpu"
    assert choose(MODEL, on(24), ranks=2, offload="nvme", disk=True).backend == "deepspeed_zero3"


def test_experts_that_cannot_be_divided_are_gathered_instead() -> None:
    found = choose(MODEL, on(80), ranks=4, undivided="its experts are a single matrix")
    assert found.backend == "deepspeed_zero3"
    assert "its experts are a single matrix" in found.reason
    with pytest.raises(ModelError, match="deepspeed_tp is not possible, its experts are a single matrix; use"):
        choose(MODEL, on(80), ranks=4, backend="deepspeed_tp", undivided="its experts are a single matrix")


def test_ranks_that_are_not_needed_are_said_to_be() -> None:
    assert "one device would hold all" in choose(MODEL, on(120), ranks=2).reason
    assert "one device would hold all" not in choose(MODEL, on(119), ranks=2).reason


def test_what_is_named_is_taken_to_the_brim() -> None:
    assert choose(MODEL, on(101)).backend == "accelerate"
    assert choose(MODEL, on(101), backend="single").backend == "single"
    assert choose(MODEL, on(120), backend="accelerate").offload == "cpu"
    assert choose(MODEL, on(200), ranks=2, backend="deepspeed_zero3").offload == "none"
    assert choose(MODEL, on(200), ranks=1, backend="deepspeed_zero3", offload="cpu").offload == "cpu"
    assert choose(MODEL, on(200), ranks=1, backend="deepspeed_tp").ranks == 1


def test_on_a_cpu_the_host_is_the_device() -> None:
    assert choose(MODEL, on(120, 120, "cpu")).backend == "single"
    with pytest.raises(ModelError, match=r"needs 120.0 GiB of a device's 110.0 GiB.*or model.offload_folder"):
        choose(MODEL, on(110, 110, "cpu"))
    # A layer of 12, 4 outside, and the 2 of every layer that are not written: 32, and a fifth more.
    assert choose(MODEL, on(39, 39, "cpu"), disk=True).offload == "nvme"
    with pytest.raises(ModelError, match=r"accelerate with offload nvme needs 38.4 GiB of a device's 38.0 GiB"):
        choose(MODEL, on(38, 38, "cpu"), disk=True)
    with pytest.raises(ModelError, match="accelerate keeps its layers on disk where the device is the CPU"):
        choose(MODEL, on(30, 30, "cpu"), backend="accelerate")
    assert choose(MODEL, on(130, 260, "cpu"), ranks=2, backend="deepspeed_zero3").offload == "none"
    for backend in ("auto", "accelerate", "deepspeed_zero3"):
        with pytest.raises(ModelError, match=r"model\.offload: 'cpu' is not possible where the device is the CPU"):
            choose(MODEL, on(130, 130, "cpu"), backend=backend, offload="cpu", disk=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "megatron"}, "model.backend: 'megatron' is unknown; known are auto, single, accelerate"),
        ({"offload": "tape"}, "model.offload: 'tape' is unknown; known are auto, none, cpu, nvme"),
        ({"ranks": 0}, "cluster.ranks: 0 is not possible; it takes a whole number of at least 1"),
        ({"ranks": 9, "backend": "deepspeed_tp"}, "cluster.ranks: 9 is more than the 8 experts of a layer.*at most 8"),
        ({"ranks": 2, "backend": "single"}, "cluster.ranks: 2 is not possible with model.backend: single.*use 1"),
        ({"ranks": 2, "backend": "accelerate"}, "cluster.ranks: 2 is not possible with model.backend: accelerate"),
        ({"offload": "nvme"}, "model.offload: 'nvme' needs model.offload_folder"),
        ({"backend": "single", "offload": "cpu"}, "model.offload: 'cpu' is not possible with model.backend: single"),
        ({"backend": "accelerate", "offload": "none"}, "model.offload: 'none' is not possible with model.backend: acc"),
        ({"backend": "single"}, r"single cannot hold 100.0 GiB of weights.*needs 100.0 GiB of a device's 24.0 GiB"),
        ({"ranks": 2, "offload": "none"}, r"use cluster.ranks: 24, where deepspeed_zero3 fits"),
    ],
)
def test_what_is_not_possible_is_said_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        choose(MODEL, on(24), **options)
    assert "\n" not in str(raised.value)


def test_a_device_too_small_for_one_layer_is_said_to_be() -> None:
    with pytest.raises(ModelError, match=r"use devices with more than 16.0 GiB: what lies outside the layers"):
        choose(MODEL, on(12), ranks=8)


def test_the_ranks_needed_are_the_fewest_that_fit() -> None:
    assert ranks_needed(MODEL, on(120), "single", "none") == 1
    assert ranks_needed(MODEL, on(119), "single", "none") is None
    # 4 + 8 * (1 + 1 + 2.5) = 40, and a whole layer of 12; of 1, 2, 4 and 8
    assert ranks_needed(MODEL, on(52), "deepspeed_tp", "none") == 4
    assert ranks_needed(MODEL, on(51), "deepspeed_tp", "none") == 8
    assert ranks_needed(MODEL, on(24), "deepspeed_tp", "none") is None
    found = ranks_needed(MODEL, on(24), "deepspeed_zero3", "none")
    assert found == 24  # 16 + 96 / n, and a fifth more, within 24
    assert ranks_needed(MODEL, on(24), "deepspeed_zero3", "cpu") == 1


@pytest.mark.parametrize("name", names())
def test_every_named_model_is_meant_for_what_is_chosen(name: str) -> None:
    known = named_model(name)
    assert known is not None
    found = outline(configuration_of(known.fields(), name), source=name, dtype=known.dtype)
    weights = weights_of(found.module, found.layers, found.sites)
    chosen = choose(
        weights, Machine("cuda", int(known.device_memory), 2 * 2**40), ranks=known.ranks,
        undivided=why_undivided(found.sites),
    )  # fmt: skip
    assert (chosen.backend, chosen.offload) == (known.backend, known.offload)


def test_experts_stacked_otherwise_cannot_be_divided() -> None:
    found = outline(config_of("olmoe"), source="olmoe")
    assert why_undivided(found.sites) is None
    experts = found.sites[1].experts
    experts.down_proj = torch.nn.Parameter(torch.empty(9, 64, 32, device="meta"))
    reason = why_undivided(found.sites)
    assert reason is not None
    assert "down_proj in layer 1 is [9, 64, 32]" in reason


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": "1000\n"}, 1000),  # a container that sees its own group alone
        ("0::/user/job\n", {"sys/fs/cgroup/user/memory.max": "2000", "sys/fs/cgroup/user/job/memory.max": "max"}, 2000),
        ("1:cpu:/a\n9:cpu,memory:/a\n0::/\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000"}, 3000),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n"}, None),
        ("0::/\n", {}, None),
        (None, {}, None),
    ],
)
def test_a_hosts_memory_is_what_its_control_groups_leave(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int | None
) -> None:
    for name, text in {**limits, **({} if groups is None else {"proc/self/cgroup": groups})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == (psutil.virtual_memory().total if expected is None else expected)


def test_a_folder_for_layers_is_there_and_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"model.offload_folder: '/no/such' does not exist; name a folder on a local"):
        local_folder("/no/such")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # whoever runs the tests may write anywhere
    with pytest.raises(ModelError, match="cannot be written to; name a folder that can"):
        local_folder(str(tmp_path))


def test_this_machine() -> None:
    two = machine_of(torch.device("cpu"), 2)
    assert (two.device, two.memory) == ("cpu", two.host // 2)
    if not torch.cuda.is_available():
        with pytest.raises(
            ModelError, match=r"model.device: 'cuda' was asked for, but this machine has no CUDA device"
        ):
            machine_of(torch.device("cuda"))
