"""Heads and experts divided over ranks that run one task together, against the model in one piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from families import Float64Throughout, build, config_of, texts
from shard_ranks import Failed, Ranks
from torch.nn import functional as F

from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare
from audit.models.shards import tensor_parallel
from audit.models.shards.division import divide_module, skeleton
from audit.models.shards.expert_slices import DividedExperts
from audit.models.shards.tensor_parallel import DeepSpeedTensorParallel
from audit.models.shards.together import Together
from audit.models.weights import weight_metrics
from audit.pruning import prune_table
from audit.pruning.plan import plan_prunings
from audit.studies.observed import metric_table

KEY = ["layer", "unit", "intervention", "sequence", "position", "expert"]
LENGTHS = (19, 8)
POSITIONS = [np.arange(0, 19, 2), np.array([0, 3, 7])]
# What stays whole, and why; families that are not named divide everything.
WHOLE = {"olmoe": ("self_attn", "must match the size")}
FAMILIES = ["olmoe", "qwen2_moe", "deepseek_v3", *("deepseek_v2", "mixtral", "qwen3_moe", "gpt_oss", "glm4_moe")]
QUICK = {"olmoe", "gpt_oss"}


def some(families: list[str]) -> list[Any]:
    return [family if family in QUICK else pytest.param(family, marks=pytest.mark.full) for family in families]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def divided(rank: int, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> MoEModel:
    """The family's random model, of which rank 0 has the weights."""
    module = build(family, dtype=dtype, **options) if rank == 0 else skeleton(config_of(family, **options), dtype=dtype)
    shard = DeepSpeedTensorParallel(rank, dist.get_world_size(), device=torch.device("cpu"))
    return prepare(divide_module(module, shard, torch.device("cpu")), shard=shard, linear="torch")


def exact(dtype: torch.dtype) -> Any:
    return Float64Throughout() if dtype == torch.float64 else contextlib.nullcontext()


def measured(model: MoEModel, **options: Any) -> pd.DataFrame:
    engine = Engine(model, memory=2**30, micro_batch=options.pop("micro_batch", 64), identity_every=2)
    asked: dict[str, Any] = {"layers": model.description.moe_layers[:2], "interventions": [Intervention("zero")]}
    with model.shard.task():
        found = engine.measure(texts(LENGTHS), POSITIONS, **asked | options)
    assert found.method != "oracle"
    frame: pd.DataFrame = found.effects.to_pandas()
    return frame.astype(dict.fromkeys(frame.select_dtypes("category").columns, "str")).sort_values(
        KEY, ignore_index=True
    )


def require_same(found: pd.DataFrame, whole: pd.DataFrame, tolerance: float) -> None:
    """The same experts at the same tokens, and numbers within ``tolerance`` of each other, absolutely below 1."""
    assert len(found) == len(whole) > 0
    for name in whole:
        if whole[name].dtype.kind == "f":
            pd.testing.assert_series_equal(found[name], whole[name], rtol=tolerance, atol=tolerance)
        else:
            pd.testing.assert_series_equal(found[name], whole[name])


def audit_of(
    rank: int, family: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    with exact(dtype):
        model = validate(divided(rank, family, dtype))
        frame = measured(model, **options)
    held = sum(p.numel() for p in model.layers.parameters())
    return frame, {
        "description": model.description,
        "engine": model.description.engine,
        "held": held,
        "reroute": model.reroute_refused,
        "weights": weight_metrics(model),
    }


def single(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> MoEModel:
    return prepare(build(family, dtype=dtype, **options), linear="torch")


@pytest.mark.parametrize("family", some(FAMILIES))
def test_two_ranks_give_the_effects_of_one(two: Ranks, family: str) -> None:
    model = single(family)
    whole = measured(model, attribution=True)
    for frame, told in two.all(audit_of, family, torch.float32, {"attribution": True}):
        require_same(frame, whole, 1e-5)
        notes = [note for note in told["description"].notes if "whole on every rank" in note]
        part, reason = WHOLE.get(family, ("", ""))
        assert len(notes) == bool(part)
        assert all(note.startswith(part) and reason in note for note in notes)
        assert told["engine"] == "sweep"
        assert told["reroute"] is None
        assert told["description"].parameters == model.description.parameters
        least = 0.5 if not part else 0.6
        assert told["held"] < (least + 0.06) * sum(p.numel() for p in model.layers.parameters())
        pd.testing.assert_frame_equal(told["weights"], weight_metrics(model))


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.full) for f in FAMILIES])
def test_in_float64_only_the_sixteenth_digit_differs(two: Ranks, family: str) -> None:
    with exact(torch.float64):
        whole = measured(single(family, torch.float64), attribution=True)
    for frame, _ in two.all(audit_of, family, torch.float64, {"attribution": True}):
        require_same(frame, whole, 1e-9)


OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {"scope": "sequence", "layers": [1]},
    "reroute": {"interventions": [Intervention("reroute"), Intervention("zero", target=Target("shared"))]},
    "small micro-batches": {"micro_batch": 16},
}


@pytest.mark.parametrize("name", ["sequence", *(pytest.param(n, marks=pytest.mark.full) for n in list(OPTIONS)[1:])])
def test_other_requests_too(two: Ranks, name: str) -> None:
    whole = measured(validate(single("deepseek_v3")), **OPTIONS[name])
    for frame, _ in two.all(audit_of, "deepseek_v3", torch.float32, OPTIONS[name]):
        require_same(frame, whole, 1e-5)


def observed_of(rank: int | None) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Metrics of the experts, the oracle's effects and simulated prunings; ``rank`` None: of the whole model."""
    model = validate(single("qwen2_moe") if rank is None else divided(rank, "qwen2_moe"))
    engine = Engine(model, memory=2**30, micro_batch=64, method="oracle")
    sequences = texts(LENGTHS)
    with model.shard.task():
        metrics = metric_table(engine.observe(sequences).observations, weight_metrics(model))
        asked: dict[str, Any] = {"layers": [1], "interventions": [Intervention("zero")]}
        effects = engine.measure(sequences, [np.array([4]), np.array([2])], **asked).effects.to_pandas()
        plan = plan_prunings([1, 2], ["reap"], shares=(0.25,), draws=1)
        pruned = prune_table(model, sequences, plan, metrics[metrics["domain"].isna()], seed=0).to_pandas()
    return metrics, effects, pruned


@pytest.mark.full
def test_observations_whole_forwards_and_prunings_too(two: Ranks) -> None:
    whole = observed_of(None)
    for found in two.all(observed_of):
        for ours, theirs in zip(found, whole, strict=True):
            pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_bfloat16_is_within_its_own_rounding(two: Ranks, family: str) -> None:
    whole = measured(single(family, torch.bfloat16))
    for frame, _ in two.all(audit_of, family, torch.bfloat16, {}):
        key = frame.merge(whole, on=KEY, suffixes=("", "_whole"))
        same = len(key) / len(whole)  # near a tie a token may be routed otherwise
        assert same > 0.8
        assert (key["kl"] - key["kl_whole"]).abs().median() < 0.05


@pytest.mark.full
def test_four_ranks() -> None:
    whole = measured(single("deepseek_v2"))
    with Ranks(4) as four:
        for frame, told in four.all(audit_of, "deepseek_v2", torch.float32, {}):
            require_same(frame, whole, 1e-5)
            assert not [note for note in told["description"].notes if "whole on every rank" in note]
        for frame, told in four.all(audit_of, "mixtral", torch.float32, {}):
            require_same(frame, measured(single("mixtral")), 1e-5)
            (note,) = [note for note in told["description"].notes if "whole on every rank" in note]
            assert "self_attn is whole on every rank in 4 layers, 0 the first: its 4 heads, 2 of them for keys" in note


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def wrongly(rank: int, what: str) -> tuple[list[str], pd.DataFrame]:
    """Divide with a fault that DeepSpeed or this code might have; the notes, and the effects."""
    by_rows, require, own = tensor_parallel._by_rows, tensor_parallel._require_equal, DividedExperts.forward
    enter = Together.enter
    try:
        if what == "bias on every rank":
            tensor_parallel._by_rows = lambda module, together, name, x: together.sum(  # type: ignore[assignment]
                F.linear(x, module.weight, module.bias), name
            )
        elif what == "shares of gradients":
            Together.enter = lambda self, x, name: x  # type: ignore[method-assign]
        elif what == "an unseen fault":
            tensor_parallel._by_rows = lambda module, together, name, x: F.linear(x, module.weight)  # type: ignore[assignment]
            tensor_parallel._require_equal = lambda *_: None  # type: ignore[assignment]
        elif what == "one rank's experts":
            DividedExperts.forward = lambda self, x, index, weights: own(  # type: ignore[method-assign]
                self, x, (index + (rank == 1)) % 8, weights
            )
        elif what == "an expert twice":
            DividedExperts.forward = lambda self, x, index, weights: own(self, x, index // 2, weights)  # type: ignore[method-assign]
        model = divided(rank, "gpt_oss" if what == "bias on every rank" else "deepseek_v3")
        return model.description.notes, measured(model)
    finally:
        tensor_parallel._by_rows, tensor_parallel._require_equal = by_rows, require
        DividedExperts.forward, Together.enter = own, enter  # type: ignore[method-assign]


def test_a_part_that_computes_something_else_stays_whole(two: Ranks) -> None:
    whole = measured(single("gpt_oss"))
    for notes, frame in two.all(wrongly, "bias on every rank"):
        (note,) = [note for note in notes if "whole on every rank" in note]
        assert note.startswith("self_attn is whole on every rank in 4 layers, 0 the first: its outputs differ by")
        require_same(frame, whole, 1e-5)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("an unseen fault", "ModelError: model.backend: layer 0 of this family computes something else when it is"),
        ("one rank's experts", "ModelError: model.backend: the experts of layer 1 cannot be divided over 2 ranks"),
        ("shares of gradients", "the experts of layer 1 cannot be divided over 2 ranks (its gradients differ by"),
        ("an expert twice", "the experts of layer 1 cannot be divided over 2 ranks (its outputs differ by"),
    ],
)
def test_a_wrongly_divided_layer_is_refused_on_every_rank(two: Ranks, what: str, said: str) -> None:
    for answer in two.each(wrongly, what):
        assert isinstance(answer, Failed)
        assert said in answer.strip().splitlines()[-1]


def bytes_of(rank: int) -> tuple[int, int]:
    model = divided(rank, "mixtral", experts=5)
    return Engine(model).sizes.weights, sum(p.numel() * p.element_size() for p in model.module.parameters())


def test_ranks_with_unequal_shares_cut_their_sweeps_alike(two: Ranks) -> None:
    (zero, fewer), (one, more) = two.all(bytes_of)
    assert fewer < more
    assert zero == one == more


def too_many(rank: int) -> None:
    divided(rank, "mixtral", experts=1, top_k=1)


def test_more_ranks_than_experts_are_refused(two: Ranks) -> None:
    for answer in two.each(too_many):
        assert isinstance(answer, Failed)
        assert "cluster.ranks: 2 is more than the 1 experts of layer 0; use at most 1" in answer


def disturbed(rank: int, what: str) -> tuple[str, pd.DataFrame]:
    """A task in which rank 1 does something else; what is said of it, and the effects of the next task."""
    model = _kept(rank)
    said, halvings = "nothing", 0
    options: dict[str, Any] = {}
    if rank == 1 and what == "another plan":
        options["interventions"] = [Intervention("scale", factor=0.5)]
    if rank == 1 and what == "another length":
        options["layers"] = model.description.moe_layers[:1]
    if rank == 1 and what in ("no memory", "an error"):
        path, calls = model.experts[2], [0]
        mixture = path.mixture

        def failing(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                raise {"no memory": torch.OutOfMemoryError("of a test")}.get(what, ZeroDivisionError("of a test"))
            return mixture(*args)

        path.mixture = failing  # type: ignore[method-assign]
    gate = model.sites[1].router.weight  # type: ignore[union-attr]
    if rank == 1 and what == "another routing":
        gate.data = -gate.data
    engine = Engine(model, memory=2**30, micro_batch=64, identity_every=2)
    asked: dict[str, Any] = {"layers": model.description.moe_layers[:2], "interventions": [Intervention("zero")]}
    try:
        with model.shard.task():
            halvings = engine.measure(texts(LENGTHS), POSITIONS, **asked | options).halvings
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        model.experts[2].__dict__.pop("mixture", None)
        if rank == 1 and what == "another routing":
            gate.data = -gate.data
    return (f"{halvings} halvings" if what == "no memory" else said), measured(model, micro_batch=64 >> halvings)


_MODELS: dict[str, MoEModel] = {}


def _kept(rank: int) -> MoEModel:
    if not _MODELS:
        _MODELS["mixtral"] = divided(rank, "mixtral")
    return _MODELS["mixtral"]


@pytest.mark.parametrize(
    ("what", "zero", "one"),
    [
        ("another plan", "ShardError: a sweep: rank 1 is about to", "ShardError: a sweep: rank 0 is about to"),
        ("another length", "ShardError: a sweep: rank 1 is about to", "ShardError: a sweep: rank 0 is about to"),
        ("another routing", "ShardError: layer 1 mlp.experts, outputs: ", "ShardError: layer 1 mlp.experts, outputs: "),
        ("no memory", "1 halvings", "1 halvings"),
        ("an error", "ShardError: rank 1 failed", "ZeroDivisionError: of a test"),
    ],
)
def test_what_one_rank_does_alone_reaches_the_other(two: Ranks, what: str, zero: str, one: str) -> None:
    whole = measured(single("mixtral"))
    answers = two.all(disturbed, what)
    for (said, frame), expected in zip(answers, (zero, one), strict=True):
        assert said.startswith(expected)
        require_same(frame, whole, 1e-5)
