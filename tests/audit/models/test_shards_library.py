"""transformers' own tensor parallelism against the model in one piece, and so against the audit's own division."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from shard_ranks import Failed, Ranks
from test_shards_tp import FAMILIES, measured, require_same, single

from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models import prepare
from audit.models.shards.library_parallel import TransformersParallel, load_parallel
from audit.models.sources import Reading
from audit.models.weights import weight_metrics

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def audit_of(rank: int, folder: str, interventions: list[Intervention]) -> tuple[pd.DataFrame, dict[str, Any]]:
    shard = TransformersParallel(rank, dist.get_world_size(), device=torch.device("cpu"))
    module, _ = load_parallel(Reading(source=folder, device="cpu"), shard)
    model = validate(prepare(module, shard=shard, linear="torch"))
    told = {
        "held": shard.weight_bytes(model.layers, model.module),
        "description": model.description,
        "weights": weight_metrics(model),
    }
    return measured(model, attribution=True, interventions=interventions[rank : rank + 1]), told


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_gives_the_effects_of_one_process(two: Ranks, family: str, tmp_path: Path) -> None:
    model = single(family)
    model.module.save_pretrained(tmp_path)
    whole = measured(model, attribution=True)
    for frame, told in two.all(audit_of, str(tmp_path), [Intervention("zero")] * 2):
        require_same(frame, whole, 1e-5)
        assert told["description"].engine == "sweep"
        assert told["description"].parameters == model.description.parameters
        # transformers has no rule for the parts of gpt-oss.
        assert told["held"] < (0.7 if family != "gpt_oss" else 1.0) * model.description.bytes
        pd.testing.assert_frame_equal(told["weights"], weight_metrics(model), rtol=1e-5)


def test_a_plan_of_one_rank_alone_is_refused(two: Ranks, tmp_path: Path) -> None:
    single("mixtral").module.save_pretrained(tmp_path)
    for answer in two.each(audit_of, str(tmp_path), [Intervention("zero"), Intervention("scale", factor=0.5)]):
        assert isinstance(answer, Failed)
        assert "ShardError: a sweep: rank" in answer
