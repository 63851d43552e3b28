"""ZeRO-3 over gloo ranks: every rank's own task gives the very numbers that a whole model gives, and nobody waits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from families import build, config_of, texts
from shard_ranks import Failed, Ranks
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from audit.engine import Engine
from audit.engine import engine as engine_module
from audit.engine import sweep as sweep_module
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare
from audit.models.discovery import ModelError
from audit.models.shards.division import divide_module, load_divided, skeleton
from audit.models.shards.zero3 import DeepSpeedZero3
from audit.models.sources import Reading
from audit.pruning import PrunedForward

ASKED = ["olmoe", "qwen2_moe", "deepseek_v2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe"]
FAMILIES = [f if f == "deepseek_v3" else pytest.param(f, marks=pytest.mark.full) for f in ASKED]
HALF = [
    f if f == "qwen2_moe" else pytest.param(f, marks=pytest.mark.full)
    for f in ("olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3")
]
CPU = torch.device("cpu")
LINEAR, EMPTY = F.linear, torch.empty
INTERVENTIONS = [
    Intervention("zero"),
    Intervention("scale", factor=0.5),
    Intervention("renormalize"),
    Intervention("reroute"),
    Intervention("zero", Target("all")),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


# ---- what runs in a rank --------------------------------------------------------------------------------------------


@cache
def whole(family: str, dtype: torch.dtype) -> MoEModel:
    return validate(prepare(build(family, dtype=dtype), linear="torch"))


@cache
def divided(family: str, dtype: torch.dtype, offload: Any = "none") -> MoEModel:
    shard = DeepSpeedZero3(dist.get_rank(), dist.get_world_size(), device=CPU, offload=offload)
    return prepared(build(family, dtype=dtype) if shard.rank == 0 else skeleton(config_of(family)), shard)


def prepared(module: Any, shard: DeepSpeedZero3) -> MoEModel:
    with shard.task():
        return validate(prepare(divide_module(module, shard, CPU), linear="torch", shard=shard))


def measured(model: MoEModel, rank: int, micro_batch: int = 64, **options: Any) -> dict[str, Any]:
    """Every column of both tables to the bit; each rank has other sequences, the second one more of them."""
    sequences = texts([(13, 6), (9, 21, 5), (11,), (4, 17)][rank], seed=rank)
    positions = [np.arange(0, len(s.token_ids), 3) for s in sequences]
    layers = options.pop("layers", model.description.moe_layers)
    options.setdefault("interventions", INTERVENTIONS)
    with model.shard.task():
        found = Engine(model, memory=2**31, micro_batch=micro_batch).measure(
            sequences, positions, layers=layers, **options
        )
    tables = {"effects": found.effects, "tokens": found.tokens}
    return {f"{name}.{column}": bits(table[column]) for name, table in tables.items() for column in table.column_names}


def bits(column: pa.ChunkedArray) -> Any:
    if pa.types.is_floating(column.type):  # comparing values would take NaN for different, and -0.0 for 0.0
        return column.is_null().to_pylist(), column.fill_null(0).to_numpy().tobytes()
    return column.to_pylist()


def effects_equal(rank: int, family: str, dtype: torch.dtype, offload: str = "none", **options: Any) -> int:
    """The rows, if all columns equal those of the whole model; which differ, if not."""
    alone = measured(whole(family, dtype), rank, **options)
    ours = measured(divided(family, dtype, offload), rank, **options)
    assert [name for name in alone if alone[name] != ours[name]] == []
    return len(alone["effects.layer"])


def one_idle(rank: int, family: str) -> int:
    """The last rank has no task at all, and serves the others."""
    model = divided(
        family, torch.float32, "none"
    )  # as effects_equal asks for it: cached, made once by all ranks together
    if rank == dist.get_world_size() - 1:
        with model.shard.task():
            return 0
    return effects_equal(rank, family, torch.float32)


def observations_equal(rank: int, folder: str) -> None:
    for name, model in (("whole", whole("olmoe", torch.float32)), ("divided", divided("olmoe", torch.float32))):
        with model.shard.task():
            found = Engine(model).observe(texts((15, 8), seed=rank), stored_outputs=16)
        found.save(f"{folder}/{rank}/{name}")
    files = [
        {path.name: path.read_bytes() for path in Path(folder, str(rank), name).iterdir()}
        for name in ("whole", "divided")
    ]
    assert len(files[0]) == 2
    assert files[0] == files[1]


def pruning_equal(rank: int) -> None:
    ids = [torch.from_numpy(s.token_ids) for s in texts((14, 9), seed=rank)]
    found = []
    for model in (whole("olmoe", torch.float32), divided("olmoe", torch.float32)):
        with model.shard.task():
            forward = PrunedForward(model, ids)
            outcomes = forward.outcomes({1: (0, 3), 3: (2,)} if rank else {2: (1, 6)})
        found.append((forward.baseline_loss_M, outcomes.kl, outcomes.delta_loss))
    for alone, ours in zip(*found, strict=True):
        assert torch.equal(alone, ours)
    assert float(found[0][1].mean()) > 1e-4


def gathers(rank: int, micro_batch: int, interventions: Sequence[Intervention]) -> tuple[int, dict[int, int]]:
    """Sweeps, and gathers of each layer, while a task is measured that all ranks have."""
    model, sweeps = divided("olmoe", torch.float32), []
    own, before = sweep_module.sweep, dict(model.shard.gathers)

    def counting(*args: Any, **kwargs: Any) -> Any:
        sweeps.append(1)
        return own(*args, **kwargs)

    engine_module.sweep = counting
    try:
        measured(model, 0, micro_batch, interventions=interventions)
    finally:
        engine_module.sweep = own
    return len(sweeps), {layer: count - before[layer] for layer, count in model.shard.gathers.items()}


def breaking(error: BaseException) -> Callable[[], None]:
    """From now on the second layer's virtual tokens meet this error, once."""
    own = sweep_module._carry

    def carry(model: Any, rows: Any, clean: Any, *args: Any) -> None:
        if clean.layer == 1:
            sweep_module._carry = own
            raise error
        own(model, rows, clean, *args)

    sweep_module._carry = carry
    return lambda: setattr(sweep_module, "_carry", own)


def out_of_memory_on_the_first(rank: int) -> None:
    alone = measured(whole("olmoe", torch.float32), rank, micro_batch=32 if rank == 0 else 64)
    model = divided("olmoe", torch.float32)
    restore = breaking(torch.OutOfMemoryError("made up")) if rank == 0 else lambda: None
    try:
        ours = measured(model, rank, micro_batch=64)
    finally:
        restore()
    assert [name for name in alone if alone[name] != ours[name]] == []


def error_on_the_second(rank: int) -> int:
    model = divided("olmoe", torch.float32)
    if rank == 0:
        return effects_equal(rank, "olmoe", torch.float32)
    restore = breaking(KeyError("made up"))
    try:
        return len(measured(model, rank))
    finally:
        restore()


def dying_on_the_second(rank: int) -> int:
    model = divided("olmoe", torch.float32)
    if rank == 1:
        with model.shard.task(), model.shard.visit(0):
            os._exit(1)
    return len(measured(model, rank))


def held(rank: int, offload: str = "none") -> dict[str, Any]:
    """What a rank holds of a model outside visits, and inside one."""
    model = divided("olmoe", torch.float32, offload)
    parameters = [list(layer.parameters()) for layer in model.layers]
    outside = [sum(p.numel() for p in layer) for layer in parameters]
    inside = []

    def look() -> None:
        with model.shard.visit(2):
            inside.extend(sum(p.numel() for p in layer) for layer in parameters)
            raise KeyError

    with model.shard.task(), pytest.raises(KeyError):  # released all the same
        look()
    after = [sum(p.numel() for p in layer) for layer in parameters]
    return {
        "outside": outside,
        "inside": inside,
        "after": after,
        "share": [sum(p.ds_tensor.numel() for p in layer) for layer in parameters],
        "whole": [sum(p.ds_shape.numel() for p in layer) for layer in parameters],
        "bytes": model.shard.weight_bytes(model.layers, model.module),
        "hooks": [_hooks(m.module) for m in (model, whole("olmoe", torch.float32))],
        "linear": F.linear is LINEAR,
    }


def _hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def equal_from_files(rank: int, folder: str) -> list[int]:
    """How many shares of each layer lie in files."""
    sizes = {"hidden_size": 256, "intermediate_size": 256}  # DeepSpeed writes no files below 1 MiB
    alone = validate(prepare(build("olmoe", dtype=torch.float32, **sizes), linear="torch"))
    shard = DeepSpeedZero3(rank, dist.get_world_size(), device=CPU, offload="nvme", folder=folder)
    module = build("olmoe", dtype=torch.float32, **sizes) if rank == 0 else skeleton(config_of("olmoe", **sizes))
    model = prepared(module, shard)
    first, second = measured(alone, rank), measured(model, rank)
    assert [name for name in first if first[name] != second[name]] == []
    return [
        sum(p.ds_tensor.final_location == "nvme" for p in layer.parameters())  # type: ignore[attr-defined]
        for layer in model.layers
    ]


def types_of(rank: int, folder: str) -> dict[str, str]:
    shard = DeepSpeedZero3(rank, dist.get_world_size(), device=CPU)
    module, _ = load_divided(Reading(source=folder, dtype="bfloat16", device="cpu"), shard)
    return {name: str(p.dtype) for name, p in [*module.named_parameters(), *module.named_buffers()]}


def refused(rank: int, *folders: str) -> str:
    shard = DeepSpeedZero3(rank, dist.get_world_size(), device=CPU)
    with pytest.raises(ModelError) as error:
        load_divided(Reading(source=folders[rank], device="cpu"), shard)
    return str(error.value)


class WrongOnTheSecond(DeepSpeedZero3):
    """Rank 1 keeps a wrong share of one matrix of layer 2."""

    def divide(self, number: int, layer: nn.Module, output: Callable[[], torch.Tensor]) -> None:
        super().divide(number, layer, output)
        if number == 2 and self.rank == 1:
            self._layers[2][0].ds_tensor.mul_(1.01)  # type: ignore[attr-defined]


def wrongly_divided(rank: int) -> str:
    shard = WrongOnTheSecond(rank, dist.get_world_size(), device=CPU)
    module = build("olmoe", dtype=torch.float32) if rank == 0 else skeleton(config_of("olmoe"))
    with pytest.raises(ModelError) as error:
        divide_module(module, shard, CPU)
    return str(error.value)


def out_of_memory_before_division(rank: int, of: str) -> str:
    shard = DeepSpeedZero3(rank, dist.get_world_size(), device=CPU)
    module = build("olmoe", dtype=torch.float32) if rank == 0 else skeleton(config_of("olmoe"))
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1 and of == "a probe":
            patched.setattr(module.model.layers[2], "forward", _no_memory)
        if rank == 1 and of == "a layer":
            patched.setattr(torch, "empty", _no_memory_for_weights)
        with pytest.raises((ModelError, MemoryError)) as error:
            divide_module(module, shard, CPU)
    return str(error.value)


def _no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("none left")


def _no_memory_for_weights(*size: Any, **options: Any) -> Any:
    if isinstance(size[0], tuple):
        raise MemoryError("none left")
    return EMPTY(*size, **options)  # what ranks exchange


def layers_that_share_weights(rank: int) -> str:
    shard = DeepSpeedZero3(rank, dist.get_world_size(), device=CPU)
    module = build("olmoe", dtype=torch.float32) if rank == 0 else skeleton(config_of("olmoe"))
    first, second = (layer.self_attn.q_proj for layer in module.model.layers[:2])
    second.weight = first.weight
    with pytest.raises(ModelError) as error:
        divide_module(module, shard, CPU)
    return str(error.value)


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_a_whole_model_to_the_bit(pair: Ranks, family: str) -> None:
    first, second = pair.all(effects_equal, family, torch.float32)
    assert second > first > 100


@pytest.mark.parametrize("family", HALF)
def test_in_half_precision_as_well(pair: Ranks, family: str) -> None:
    assert min(pair.all(effects_equal, family, torch.bfloat16)) > 100


def test_a_rank_without_a_task_serves_the_others(pair: Ranks) -> None:
    rows, none = pair.all(one_idle, "olmoe")
    assert rows > 100
    assert none == 0


def test_shares_in_host_memory(pair: Ranks) -> None:
    assert min(pair.all(effects_equal, "olmoe", torch.float32, "cpu")) > 100


@pytest.mark.parametrize(
    "options",
    [
        {"attribution": True, "interventions": [Intervention("zero")]},
        {"scope": "sequence", "interventions": [Intervention("zero")], "layers": (0, 2)},
        {"redistribution": True, "interventions": [Intervention("zero")]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_is_measured(pair: Ranks, options: dict[str, Any]) -> None:
    assert min(pair.all(_effects_with, options)) > 20


def _effects_with(rank: int, options: dict[str, Any]) -> int:
    return effects_equal(rank, "olmoe", torch.float32, **options)


def oracle_equal(rank: int) -> None:
    found = []
    for model in (whole("olmoe", torch.float32), divided("olmoe", torch.float32)):
        sequences = texts((8,) if rank else (6,), seed=rank)
        with model.shard.task():
            engine = Engine(model, method="oracle")
            effects = engine.measure(
                sequences, [np.array([2, 5])], layers=[1], interventions=[Intervention("zero")]
            ).effects
        found.append({column: bits(effects[column]) for column in effects.column_names})
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_the_oracle(pair: Ranks) -> None:
    pair.all(oracle_equal)


def test_observations(pair: Ranks, tmp_path: Path) -> None:
    pair.all(observations_equal, str(tmp_path))


def test_simulated_pruning(pair: Ranks) -> None:
    pair.all(pruning_equal)


def test_one_gather_per_layer_and_sweep_however_many_virtual_tokens(pair: Ranks) -> None:
    few = pair.all(gathers, 512, [Intervention("zero", Target("all"))])
    many = pair.all(gathers, 16, INTERVENTIONS)
    for sweeps, by_layer in (*few, *many):
        assert sweeps == 2  # one, and some of its effects again under another rounding
        assert by_layer == dict.fromkeys(range(4), sweeps)


def test_out_of_memory_on_one_rank_is_its_own_affair(pair: Ranks) -> None:
    pair.all(out_of_memory_on_the_first)


def test_an_error_on_one_rank_is_its_own_affair(pair: Ranks) -> None:
    first, second = pair.each(error_on_the_second)
    assert first > 100
    assert isinstance(second, Failed)
    assert "made up" in second
    assert min(pair.all(effects_equal, "olmoe", torch.float32)) > 100  # and the group goes on


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_rank_holds_its_share_and_no_hook_or_kernel_is_exchanged(pair: Ranks, offload: str) -> None:
    for found in pair.all(held, offload):
        assert found["outside"] == found["after"] == [0] * 4
        assert found["inside"] == [0, 0, found["whole"][2], 0]
        assert [2 * n for n in found["share"]] == found["whole"]  # tiny sizes are even
        outside = 2 * 128 * 64 + 64  # embedding, head, final norm
        assert found["bytes"] == 4 * (outside + sum(found["share"]) + max(found["whole"]))
        assert found["hooks"][0] == found["hooks"][1]
        assert found["linear"]


def test_routers_that_a_family_keeps_in_float32_stay_so(pair: Ranks, tmp_path: Path) -> None:
    build("ernie4_5_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name: str(p.dtype) for name, p in [*module.named_parameters(), *module.named_buffers()]}
    assert {"torch.float32", "torch.bfloat16"} == {
        expected[name] for name, _ in module.named_parameters()
    }  # else nothing is shown
    assert pair.all(types_of, str(tmp_path)) == [expected, expected]


def test_what_one_rank_cannot_read_is_an_error_on_all(pair: Ranks, tmp_path: Path) -> None:
    build("olmoe", dtype=torch.float32).save_pretrained(tmp_path / "small")
    build("olmoe", dtype=torch.float32, experts=4).save_pretrained(tmp_path / "other")
    first, second = pair.all(refused, "/nowhere", str(tmp_path / "small"))
    assert first.startswith("model.source: '/nowhere' holds no config.json")
    assert second == first + " (rank 0)"
    for text in pair.all(refused, str(tmp_path / "small"), str(tmp_path / "other")):
        assert "the ranks read different models" in text


def test_a_wrongly_divided_layer_is_refused_on_all(pair: Ranks) -> None:
    for text in pair.all(wrongly_divided):
        assert "layer 2 of this family computes something else when it is divided" in text


@pytest.mark.parametrize("of", ["a layer", "a probe"])
def test_what_fails_on_one_rank_before_a_layer_is_divided_keeps_nobody_waiting(pair: Ranks, of: str) -> None:
    first, second = pair.all(out_of_memory_before_division, of, seconds=60)
    assert second == "none left"
    assert first == second + " (rank 1)"


def test_layers_that_share_weights_are_refused_on_all(pair: Ranks) -> None:
    said = "model.backend: model.layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight are one"
    assert all(text.startswith(said) and text.endswith("use single") for text in pair.all(layers_that_share_weights))


@pytest.mark.full
def test_shares_in_files(pair: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder  # noqa: PLC0415 -- it looks for devices

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    AsyncIOBuilder().load(verbose=False)  # compiles for minutes, once
    assert pair.all(equal_from_files, str(tmp_path)) == [[2] * 4] * 2


@pytest.mark.full
def test_four_ranks() -> None:
    with Ranks(4) as ranks:
        assert min(ranks.all(effects_equal, "deepseek_v2", torch.float32)) > 20
        assert ranks.all(one_idle, "deepseek_v2")[3] == 0


@pytest.mark.full
def test_groups_that_come_and_go_leave_nothing_in_shared_memory() -> None:
    before = _shared_memory()
    for _ in range(5):
        with Ranks(2) as ranks:
            ranks.all(held)
    assert _shared_memory() <= before


def _shared_memory() -> set[str]:
    """What DeepSpeed, torch or gloo have there; other processes of the machine come and go."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("deepspeed", "torch", "gloo"))}


@pytest.mark.full
def test_a_rank_that_dies_in_a_sweep_keeps_nobody_waiting() -> None:
    with Ranks(2) as ranks:
        ranks.all(held)
        first, second = ranks.each(dying_on_the_second, seconds=60)
    for failed in (first, second):
        assert isinstance(failed, Failed)


@pytest.fixture
def no_group_after() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_rank_needs_no_group(no_group_after: None) -> None:
    model = prepared(build("olmoe", dtype=torch.float32), DeepSpeedZero3(device=CPU))
    alone, ours = measured(whole("olmoe", torch.float32), 0), measured(model, 0)
    assert [name for name in alone if alone[name] != ours[name]] == []
    assert model.shard.gathers[0] > 0


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (None, "'nvme' needs model.offload_folder, which is not given"),
        ("/nowhere", "'/nowhere' does not exist; name a folder on a local disk"),
        (".", "apt-get install libaio-dev"),
    ],
)
def test_an_offload_that_is_not_possible_is_refused_before_anything_is_loaded(
    no_group_after: None, monkeypatch: pytest.MonkeyPatch, folder: str | None, said: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder  # noqa: PLC0415 -- it looks for devices

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *args, **kwargs: False)
    with pytest.raises(ModelError, match=r"^model\.offload") as error:
        DeepSpeedZero3(device=CPU, offload="nvme", folder=folder)
    assert said in str(error.value)
