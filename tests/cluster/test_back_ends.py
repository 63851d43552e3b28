"""Whole audits of a model that several ranks hold together, through Ray, against the model in one piece."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from rank_workers import DiesOnce
from tiny_olmoe import write_tiny_olmoe

from audit.config import AuditConfig, ConfigError
from audit.models import ModelError
from audit.models.shards.machine import Machine
from audit.runfolder import RunFolder
from cluster.display import NoDisplay
from cluster.planning import plan
from cluster.planning.plan import prepare
from cluster.run import execute


def audit_of(folder: Path, backend: str, ranks: int = 1, dtype: str = "float32", offload: str = "auto") -> AuditConfig:
    if not (folder / "model").exists():
        write_tiny_olmoe(folder / "model", layers=2, experts=5, top_k=2)
        (folder / "texts").mkdir()
        for number in range(4):
            (folder / "texts" / f"{number}.txt").write_text(f"Text {number}: the expert that answers was asked.")
    specification = {
        "model": {"source": "./model", "dtype": dtype, "backend": backend, "offload": offload},
        "corpus": {"sources": [{"kind": "text", "path": "texts", "domain": "prose"}], "max_tokens": 48},
        "calibration": {"documents": 1},
        "interventions": [{"kind": "zero"}, {"kind": "mean"}],
        "attribution": True,
        "engine": {"linear": "torch"},
        "cluster": {"max_groups": 1, "ranks": ranks},
    }
    return AuditConfig.parse(yaml.safe_load(yaml.safe_dump(specification)), folder)


def effects_of(folder: RunFolder) -> pd.DataFrame:
    frame = folder.dataset("effects").to_table().to_pandas()
    words = frame.select_dtypes("category").columns
    frame = frame.astype(dict.fromkeys(words, "str"))
    where = ["layer", "unit", "intervention", "sequence", "position", "expert"]
    return frame.sort_values(where, ignore_index=True)


@pytest.fixture(scope="module")
def place(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def whole(place: Path) -> pd.DataFrame:
    return measured(place, "whole", audit_of(place, "single"))


def measured(place: Path, name: str, config: AuditConfig) -> pd.DataFrame:
    folder = RunFolder(str(place / name))
    assert execute(prepare(config), folder, NoDisplay()).exit_status == 0
    return effects_of(folder)


@pytest.mark.parametrize("backend", ["deepspeed_tp", pytest.param("transformers_tp", marks=pytest.mark.full)])
def test_ranks_that_share_a_task_give_the_effects_of_one_process(
    place: Path, whole: pd.DataFrame, backend: str
) -> None:
    found = measured(place, backend, audit_of(place, backend, 2))
    assert len(found) == len(whole) > 100
    for name in whole:
        if whole[name].dtype.kind == "f":
            pd.testing.assert_series_equal(found[name], whole[name], rtol=0, atol=1e-5)
        else:
            pd.testing.assert_series_equal(found[name], whole[name])


@pytest.mark.full
def test_ranks_with_tasks_of_their_own_give_the_bits_of_one_process_when_one_is_killed(
    place: Path, whole: pd.DataFrame
) -> None:
    job = prepare(audit_of(place, "deepspeed_zero3", 2))
    assert job.shape.side_by_side == 2
    job = replace(job, make_worker=DiesOnce(job.make_worker, str(place / "died")))
    folder = RunFolder(str(place / "disturbed"))
    assert execute(job, folder, NoDisplay()).exit_status == 0
    assert {line["doing"] for line in folder.lines("losses.jsonl")} == {"tasks"}
    assert {line["attempt"] for line in folder.lines("losses.jsonl")} == {1}
    pd.testing.assert_frame_equal(effects_of(folder), whole, check_exact=True)


@pytest.mark.full
def test_layers_on_disk_give_the_bits_of_one_process_and_leave_no_file(place: Path, whole: pd.DataFrame) -> None:
    on_disk = place / "disk"
    on_disk.mkdir()
    config = audit_of(place, "accelerate", offload="nvme")
    model = config.model.model_copy(update={"offload_folder": str(on_disk)})
    specification = {**config.resolved(), "model": model.model_dump(mode="json")}
    found = measured(place, "accelerate", AuditConfig.parse(specification, place))
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert not list(on_disk.iterdir())


@pytest.mark.full
def test_shared_tasks_are_exact_in_float64_and_keep_their_bits_when_a_rank_is_killed(place: Path) -> None:
    exact = measured(place, "exact", audit_of(place, "single", dtype="float64"))
    calm = measured(place, "calm", audit_of(place, "deepspeed_tp", 2, "float64"))
    for name in exact.select_dtypes("float"):
        pd.testing.assert_series_equal(calm[name], exact[name], rtol=0, atol=1e-9)
    job = prepare(audit_of(place, "deepspeed_tp", 2, "float64"))
    job = replace(job, make_worker=DiesOnce(job.make_worker, str(place / "died-too")))
    folder = RunFolder(str(place / "disturbed-too"))
    assert execute(job, folder, NoDisplay()).exit_status == 0
    assert len(folder.lines("losses.jsonl")) == 1
    pd.testing.assert_frame_equal(effects_of(folder), calm, check_exact=True)


def test_a_back_end_that_is_not_possible_is_refused_before_anything_starts(place: Path) -> None:
    with pytest.raises(ModelError, match=r"cluster\.ranks: 6 is more than the 5 experts of a layer"):
        prepare(audit_of(place, "deepspeed_tp", 6))
    with pytest.raises(ModelError, match=r"cluster\.ranks: 2 is not possible with model\.backend: single"):
        prepare(audit_of(place, "single", 2))
    with pytest.raises(ModelError, match=r"model\.offload: 'nvme' needs model\.offload_folder"):
        prepare(audit_of(place, "deepspeed_zero3", 2, offload="nvme"))
    oracle = audit_of(place, "deepspeed_zero3", 2).resolved() | {"engine": {"method": "oracle"}}
    with pytest.raises(ConfigError, match=r"attribution: True needs all layers.* deepspeed_zero3 has one layer's; use"):
        prepare(AuditConfig.parse(oracle, place))


def test_a_budget_is_what_the_device_has_and_no_more(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = audit_of(place, "single")
    resolved = prepare(config).identity["resolved"]
    assert resolved["memory"] == resolved["weight_bytes"] + 2 * 2**30
    monkeypatch.setattr(plan, "resolve_device", lambda device: torch.device("cuda", 1))
    monkeypatch.setattr(plan, "machine_of", lambda device, ranks: Machine("cuda", 2 * 2**30, 64 * 2**30))
    specification = config.resolved() | {"engine": {"memory": "3GiB"}}
    with pytest.raises(
        ConfigError, match=r"engine\.memory: 3,072 MiB are more than the device's 2,048 MiB; use auto, or"
    ):
        prepare(AuditConfig.parse(specification, place))
