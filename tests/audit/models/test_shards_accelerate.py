"""Back end accelerate: layers on disk or in host memory, the same bits as whole, one load per layer and sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import SWEEP, build, texts

from audit.engine import Engine
from audit.engine.engine import Measurement
from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models import MoEModel, load_model, prepare
from audit.models.discovery import ModelError
from audit.models.memory import share_of, weights_of
from audit.models.shards import offloaded
from audit.models.shards.offloaded import Offloaded, load_offloaded
from audit.models.sources import Reading
from audit.pruning.simulation import PrunedForward

DEFAULT = (("olmoe", "disk"), ("olmoe", "host"), ("deepseek_v3", "disk"), ("gpt_oss", "disk"))
CASES = [
    pytest.param(family, place, marks=[] if (family, place) in DEFAULT else [pytest.mark.full])
    for family in SWEEP
    for place in ("disk", "host")
]
SEQUENCES = texts([17, 6])
LINEAR = "torch"  # auto is decided by a stopwatch, in each model anew
POSITIONS = [np.arange(17), np.arange(6)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"": str(tmp_path_factory.mktemp("checkpoints"))}


def checkpoint(known: dict[str, str], family: str) -> str:
    """The folder of a random checkpoint of the family, written once."""
    if family not in known:
        known[family] = str(Path(known[""]) / family)
        build(family, dtype=torch.float32).save_pretrained(known[family])
    return known[family]


def offload(source: str, place: str, folder: Path, dtype: str = "float32") -> MoEModel:
    shard = Offloaded("nvme" if place == "disk" else "cpu", str(folder))
    module, tokenizer = load_offloaded(Reading(source=source, dtype=dtype, device="cpu"), shard)
    return validate(prepare(module, tokenizer, linear=LINEAR, shard=shard))


def measure(model: MoEModel, micro_batch: int = 32, **options: Any) -> Measurement:
    return Engine(model, micro_batch=micro_batch, identity_every=4).measure(
        SEQUENCES,
        POSITIONS,
        layers=sorted(model.sites)[:2],
        interventions=[Intervention()],
        **options,
    )


def assert_same(ours: Measurement, reference: Measurement) -> None:
    for a, b in ((ours.effects, reference.effects), (ours.tokens, reference.tokens)):
        pd.testing.assert_frame_equal(a.to_pandas(), b.to_pandas(), check_exact=True)


@pytest.mark.parametrize(("family", "place"), CASES)
def test_effects_have_the_same_bits_as_whole(
    family: str, place: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    source = checkpoint(checkpoints, family)
    whole = validate(load_model(source, device="cpu", linear=LINEAR))
    ours = offload(source, place, tmp_path)
    assert_same(measure(ours, attribution=True), measure(whole, attribution=True))
    assert_same(measure(ours, scope="sequence"), measure(whole, scope="sequence"))
    for number, model in enumerate((ours, whole)):
        Engine(model).observe(SEQUENCES).save(tmp_path / str(number))
    written = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert all((tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes() for name in written)
    assert all(p.device.type == "meta" for p in ours.layers.parameters())


def test_simulated_pruning(checkpoints: dict[str, str], tmp_path: Path) -> None:
    source = checkpoint(checkpoints, "olmoe")
    models = (offload(source, "host", tmp_path), validate(load_model(source, device="cpu", linear=LINEAR)))
    ours, whole = (PrunedForward(model, [torch.arange(9)]).outcomes({1: [0, 2]}) for model in models)
    assert torch.equal(ours.kl, whole.kl)
    assert whole.kl.max() > 0


def test_each_layer_is_loaded_once_per_sweep_however_many_rows_there_are(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = offload(checkpoint(checkpoints, "olmoe"), "disk", tmp_path)
    sweeps = 0
    plain = Engine._compute

    def counted(self: Engine, *args: Any) -> Any:
        nonlocal sweeps
        sweeps += 1
        return plain(self, *args)

    monkeypatch.setattr(Engine, "_compute", counted)
    loads = []
    for micro_batch in (4096, 16):
        ours.shard.gathers.clear()
        sweeps = 0
        measure(ours, micro_batch)
        assert sweeps == 2  # the second one repeats some effects
        loads.append(dict(ours.shard.gathers))
    assert loads == [dict.fromkeys(range(4), 2)] * 2


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("ernie4_5_moe", "bfloat16"),  # routers in float32
        ("deepseek_v3", "bfloat16"),  # their biases, which are no parameters
        ("gpt_oss", "float16"),  # norms
        *(pytest.param(f, d, marks=pytest.mark.full) for f in SWEEP for d in ("bfloat16", "float16")),
    ],
)
def test_types_and_values_stay_as_they_were_read(
    family: str, dtype: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    source = checkpoint(checkpoints, family)
    whole = load_model(source, dtype=dtype, device="cpu")
    shard = Offloaded("nvme", str(tmp_path))
    ours = prepare(load_offloaded(Reading(source=source, dtype=dtype, device="cpu"), shard)[0], shard=shard)
    names = [name for name, _ in whole.module.named_parameters()]
    assert [name for name, _ in ours.module.named_parameters()] == names
    for number, layer in enumerate(ours.layers):
        with ours.shard.visit(number):
            for (name, a), (_, b) in zip(
                [*layer.named_parameters(), *layer.named_buffers()],
                [*whole.layers[number].named_parameters(), *whole.layers[number].named_buffers()],
                strict=True,
            ):
                assert a.dtype == b.dtype, name
                assert torch.equal(a, b), name
                assert not a.is_inference()


def test_a_layer_leaves_with_the_outermost_visit_also_by_an_error(checkpoints: dict[str, str], tmp_path: Path) -> None:
    ours = offload(checkpoint(checkpoints, "olmoe"), "disk", tmp_path)
    first = ours.layers[0]
    ours.shard.gathers.clear()

    def there() -> set[str]:
        return {p.device.type for p in first.parameters()}

    def fail_inside() -> None:
        with ours.shard.visit(0):
            with ours.shard.visit(0):
                assert there() == {"cpu"}
            assert there() == {"cpu"}
            assert {p.device.type for p in ours.layers[1].parameters()} == {"meta"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert there() == {"meta"}
    assert ours.shard.gathers == {0: 1}


def test_out_of_memory_while_a_layer_comes_is_met_with_smaller_micro_batches(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = offload(checkpoint(checkpoints, "olmoe"), "disk", tmp_path)
    plain, calls = offloaded.set_module_tensor_to_device, 0

    def short(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += kwargs.get("value") is not None
        if calls == 5:
            calls += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(*args, **kwargs)

    monkeypatch.setattr(offloaded, "set_module_tensor_to_device", short)
    found = measure(ours, micro_batch=32)
    assert (found.halvings, found.micro_batch) == (1, 16)
    assert all(p.device.type == "meta" for p in ours.layers.parameters())


def test_weight_bytes_are_the_share_that_is_planned_for(checkpoints: dict[str, str], tmp_path: Path) -> None:
    source = checkpoint(checkpoints, "deepseek_v3")
    whole = load_model(source, device="cpu")
    ours = offload(source, "disk", tmp_path)
    weights = weights_of(whole.module, whole.layers, whole.sites)
    assert ours.shard.weight_bytes(ours.layers, ours.module) == share_of(weights, "accelerate").device
    assert Engine(ours).sizes.weights == share_of(weights, "accelerate").device
    assert ours.description.bytes == weights.total


def test_the_folder_is_empty_again_once_the_model_is_read(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written for one process cannot outlive it, also where it is killed: nothing has a name any more."""
    source = checkpoint(checkpoints, "olmoe")
    ours = offload(source, "disk", tmp_path)
    assert not list(tmp_path.iterdir())
    kept = {line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line}
    assert any(str(tmp_path) in path and "experts" in path for path in kept)
    assert any(str(tmp_path) in note for note in ours.description.notes)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ModelError("it cannot be read")

    monkeypatch.setattr(Reading, "module", fail)
    with pytest.raises(ModelError, match="it cannot be read"):
        offload(source, "disk", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model.offload_folder: '/no/such' does not exist; name a folder on a local"):
        Offloaded("nvme", "/no/such")
    with pytest.raises(ModelError, match=r"model.offload: 'nvme' needs model.offload_folder, which is not given"):
        Offloaded("nvme")
