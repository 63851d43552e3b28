"""What a worker makes of one layer, also where effects or metrics are missing; the order of pruning verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from stub_worker import EXPERTS, LAYERS, TOP_K, tables

from audit.config import AuditConfig
from audit.effects import EFFECTS
from audit.pruning.schema import PRUNING
from audit.runfolder import Manifest, RunFolder
from audit.studies.importance import Question
from audit.studies.progressive import ProgressiveSettings
from audit.studies.redistribution import NOT_MEASURED
from cluster.layer_studies import LayerResult, LayerStudies, RedistributionSettings
from cluster.studies import make_studies
from cluster.tasks import Task

METRICS = pd.DataFrame(
    [
        {"layer": layer, "expert": e, "metric": "reap", "value": float(e), "orientation": 1, "label": "extended"}
        for layer in LAYERS
        for e in range(EXPERTS)
    ]
)


def commit(folder: RunFolder, table: pa.Table, name: str, commit_name: str) -> None:
    path = Path(folder.url, name, commit_name)
    path.mkdir(parents=True)
    pq.write_table(table, path / "0.parquet")
    folder.commit(
        Manifest(commit_name, "r", {f"{name}-{commit_name}": {}}, {name: [f"{name}/{commit_name}/0.parquet"]})
    )


def single_experts() -> pd.DataFrame:
    """Effects of two active experts at eight tasks' positions, and identity rows."""
    tasks = [Task(id=f"effects-{n:04d}", kind="measure", positions=(np.arange(1, 9),), layers=LAYERS) for n in range(8)]
    frame: pd.DataFrame = pa.concat_tables(tables(task)["effects"] for task in tasks).to_pandas()
    words = frame.select_dtypes("category").columns
    # Both experts of a token may be drawn alike by the stub; here the second is another one.
    frame = frame.assign(**{name: frame[name].astype(object) for name in words})
    return frame.assign(expert=(frame["expert"] // 2) * 2 + frame["slot"])


def sets(single: pd.DataFrame, target: str, layers: tuple[int, ...] = LAYERS) -> pd.DataFrame:
    """Sets of one expert in place of the experts of the first slot."""
    rows = single[(single["slot"] == 0) & single["layer"].isin(layers)]
    return rows.assign(unit="set", target=target, parameter=1.0, expert=None, slot=None)


def run_with(path: Path, *frames: pd.DataFrame) -> RunFolder:
    folder = RunFolder(str(path))
    for number, frame in enumerate(frames):
        commit(folder, pa.Table.from_pandas(frame, EFFECTS, preserve_index=False), "effects", f"c{number}")
    return folder


def made(folder: RunFolder, layer: int, **given: Any) -> LayerResult:
    work: dict[str, Any] = {
        "metrics": METRICS,
        "question": Question(random_rankings=9),
        "progressive": ProgressiveSettings(bootstrap_draws=50),
        "redistribution": RedistributionSettings(scope="token", seed=0),
    }
    found = LayerStudies(url=folder.url, model="stub", **(work | given))({"layer": layer})
    assert found["layer"] == layer
    result: LayerResult = ray.cloudpickle.loads(found["result"])
    return result


def test_every_study_of_a_layer(tmp_path: Path) -> None:
    single = single_experts()
    folder = run_with(tmp_path, single, sets(single, "highest"), sets(single, "random").assign(draw=0))
    found = made(folder, 3)
    (study,) = found.importance
    assert (study.cell.layer, study.cell.intervention, study.cell.scope) == (3, "zero", "token")
    assert {row["metric"] for row in study.cells} >= {"reap", "random_token", "identity"}
    assert found.progressive is not None
    curve = found.progressive.set_index("order")
    first = single[(single["layer"] == 3) & (single["slot"] == 0)]
    assert curve.loc["highest", "mean"] == pytest.approx(first["delta_loss"].astype(float).mean(), rel=1e-6)
    assert curve.loc["highest", "tokens"] == len(first)
    assert found.redistribution is not None
    gap = found.redistribution.set_index("quantity")
    both = single[(single["layer"] == 3) & (single["unit"] == "expert")]
    assert len(both) == TOP_K * len(first)
    assert gap.loc["gap_norm", "mean"] == pytest.approx(both["gap_norm"].astype(float).mean())
    assert gap.loc["relative_compensation", "reason"] == NOT_MEASURED
    assert math.isnan(gap.loc["relative_compensation", "mean"])


def test_the_order_of_commits_and_rows_is_of_no_matter(tmp_path: Path) -> None:
    single = single_experts()
    removals = sets(single, "highest")
    one = made(run_with(tmp_path / "one", single, removals), 1)
    mixed = pd.concat([removals, single]).sample(frac=1, random_state=0)
    two = made(run_with(tmp_path / "two", mixed.iloc[:50], mixed.iloc[50:]), 1)
    assert repr(one.importance[0].cells) == repr(two.importance[0].cells)
    for name in ("progressive", "areas", "redistribution", "weight_and_gap"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)


def test_a_layer_whose_own_effects_were_given_up_has_its_progressive_study(tmp_path: Path) -> None:
    single = single_experts()
    folder = run_with(tmp_path, single[single["layer"] == 1], sets(single, "highest"))
    found = made(folder, 3)
    assert found.importance == []
    assert (found.redistribution, found.weight_and_gap) == (None, None)
    assert found.progressive is not None


def test_sets_that_are_in_no_order_are_no_progressive_ablation(tmp_path: Path) -> None:
    single = single_experts()
    listed = sets(single, "listed").assign(parameter=None)
    means = sets(single, "highest").assign(intervention="mean")
    folder = run_with(tmp_path, single, listed, means, sets(single, "highest", layers=(1,)))
    assert made(folder, 3).progressive is None
    assert made(folder, 1).progressive is not None


def test_without_metrics_what_needs_none_is_made(tmp_path: Path) -> None:
    found = made(run_with(tmp_path, single_experts()), 1, metrics=None)
    assert found.importance == []
    assert found.redistribution is not None


def test_what_was_not_asked_for_is_not_made(tmp_path: Path) -> None:
    single = single_experts()
    folder = run_with(tmp_path, single, sets(single, "highest"))
    found = made(folder, 1, question=None, progressive=None, redistribution=None)
    assert found == LayerResult()
    assert make_studies(folder, AuditConfig(), "stub", None) == {}


def pruning_rows() -> pd.DataFrame:
    """Two metrics and three draws, at two shares, in five places, on four documents; losses differ by all of them."""
    rng = np.random.default_rng(0)
    orders = [(m, o, None) for m in ("reap", "ean") for o in ("metric", "reverse")]
    orders += [("random", "random", draw) for draw in range(3)]
    places = {"all layers": [2, 10, 11], "early third": [2], "layer 11": [11], "layer 2": [2], "layer 10": [10]}
    rows = [
        {
            "criterion": criterion, "order": order, "draw": draw, "share": share, "where": where, "layers": layers,
            "document": document, "tokens": 10, "loss_sum": 30 + rng.random(), "baseline_loss_sum": 30.0,
            "kl_sum": rng.random(),
        }
        for where, layers in places.items()
        for share in (0.5, 0.25)
        for criterion, order, draw in orders
        for document in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_pruning_verdicts_are_in_the_models_order_whoever_wrote_them_when(tmp_path: Path) -> None:
    rows = pruning_rows()
    config = AuditConfig.parse({"studies": {"redundancy": {"bootstrap_draws": 100}}}, tmp_path)
    found = []
    for number, seed in enumerate((1, 2)):
        folder, mixed = RunFolder(str(tmp_path / str(number))), rows.sample(frac=1, random_state=seed)
        for part, frame in enumerate(np.array_split(np.arange(len(mixed)), 3)):
            table = pa.Table.from_pandas(mixed.iloc[frame], PRUNING, preserve_index=False)
            commit(folder, table, "pruning", f"c{part}")
        found.append(make_studies(folder, config, "stub", None))
    assert set(found[0]) == {"redundancy.parquet", "redundancy_verdicts.parquet"}
    for name, table in found[0].items():
        assert isinstance(table, pa.Table)
        assert table.equals(found[1][name])
    verdicts = found[0]["redundancy_verdicts.parquet"].to_pandas()  # type: ignore[union-attr]
    places = ["layer 2", "layer 10", "layer 11", "early third", "all layers"]
    assert verdicts["where"].tolist() == [place for place in places for _ in range(2)]
    assert verdicts["share"].tolist() == [0.25, 0.5] * 5
    metric = rows[(rows["order"] == "metric") & (rows["where"] == "all layers") & (rows["share"] == 0.5)]
    best = metric.groupby("criterion")["kl_sum"].sum().idxmin()
    assert verdicts.iloc[-1]["best"] == best


def test_a_run_whose_prunings_were_all_given_up_has_no_verdicts(tmp_path: Path) -> None:
    config = AuditConfig.parse({"studies": {"redundancy": {}}}, tmp_path)
    assert make_studies(run_with(tmp_path, single_experts()), config, "stub", None) == {}
