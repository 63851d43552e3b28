"""What workers make of one layer, also where effects or metrics are missing; the order of pruning verdicts."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from audit.config import AuditConfig
from audit.effects import EFFECTS
from audit.effects import OUTCOMES as EFFECT_OUTCOMES
from audit.pruning.schema import PRUNING
from audit.runfolder import Manifest, RunFolder
from audit.statistics.cells import Settings
from audit.statistics.pooled import pooled_table
from audit.studies import summary
from audit.studies.active_experts import COLUMNS, active_experts
from audit.studies.importance import CandidateStudy, Cell, Question, study_layer
from audit.studies.importance_tables import CONTRASTS, importance_tables
from audit.studies.progressive import ProgressiveSettings
from audit.studies.redistribution import NOT_MEASURED
from benchmarks.faults.trial import EXPERTS, LAYERS, TOP_K, tables
from cluster.results import studies as studies_module
from cluster.results.layer_rows import EffectFiles
from cluster.results.layer_studies import LayerLines, LayerStudies, RedistributionSettings, What, pooled_rows
from cluster.results.reducer import summarize
from cluster.results.studies import make_studies
from cluster.tasks import Task

QUESTION = Question(random_rankings=9, settings=Settings(bootstrap_draws=100))
IMPORTANCE = {"random_rankings": 9, "bootstrap_draws": 100, "outcomes": ["kl", "delta_loss"]}
PROGRESSIVE = {"draws": 1}
NO_FLOOR = summary.noise_floor([summary.noise_values(EFFECTS.empty_table())], [])
NO_LAYERS = summary.layer_summary(summary.merge([]))
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


ZERO = What("zero", None, "token")


def work(folder: RunFolder, **given: Any) -> LayerStudies:
    asked: dict[str, Any] = {
        "metrics": METRICS,
        "question": Question(random_rankings=9),
        "progressive_settings": ProgressiveSettings(bootstrap_draws=50),
        "redistribution_settings": RedistributionSettings(scope="token", seed=0),
    }
    return LayerStudies(files=EffectFiles(folder.url, folder.files("effects")), model="stub", **(asked | given))


def importance(folder: RunFolder, layer: int, question: Question) -> tuple[list[LayerLines], list[CandidateStudy]]:
    *lines, studies = work(folder, question=question).importance(layer, ZERO)
    return lines, studies  # type: ignore[return-value]


def results(folder: RunFolder, metrics: pd.DataFrame | None = METRICS, **studies: Any) -> dict[str, pa.Table]:
    """What the reducer makes of the studies: summaries first, then tables by the name of their file."""
    files = EffectFiles(folder.url, folder.files("effects"))
    summed = [summarize(files, layer, None) for layer in sorted(files.layers())]
    layers, floor = (pa.concat_tables(getattr(one, name) for one in summed) for name in ("layers", "floor"))
    config = AuditConfig.parse({"studies": studies}, Path())
    observed = None if metrics is None else pa.Table.from_pandas(metrics.assign(domain=None), preserve_index=False)
    found = make_studies(folder, files, config, "stub", observed, layers, floor)
    return {
        name: table if isinstance(table, (pa.Table, str)) else pa.concat_tables(table) for name, table in found.items()
    }


def test_every_study_of_a_layer(tmp_path: Path) -> None:
    single = single_experts()
    folder = run_with(tmp_path, single, sets(single, "highest"), sets(single, "random").assign(draw=0))
    lines, studies = importance(folder, 3, QUESTION)
    assert {(one.cell.layer, one.cell.intervention, one.cell.scope) for one in studies} == {(3, "zero", "token")}
    assert {row["metric"] for one in studies for row in one.cells} >= {"reap", "random_token", "identity"}
    assert len(lines) == len(studies) - 1  # identity has none
    curves, areas = work(folder).progressive(3)
    assert len(areas)
    curve = curves.set_index("order")
    first = single[(single["layer"] == 3) & (single["slot"] == 0)]
    assert curve.loc["highest", "mean"] == pytest.approx(first["delta_loss"].astype(float).mean(), rel=1e-6)
    assert curve.loc["highest", "tokens"] == len(first)
    found = work(folder).redistribution(3)
    assert found is not None
    gap = found[0].set_index("quantity")
    both = single[(single["layer"] == 3) & (single["unit"] == "expert")]
    assert len(both) == TOP_K * len(first)
    assert gap.loc["gap_norm", "mean"] == pytest.approx(both["gap_norm"].astype(float).mean())
    assert gap.loc["relative_compensation", "reason"] == NOT_MEASURED
    assert math.isnan(gap.loc["relative_compensation", "mean"])


def test_the_order_of_commits_and_rows_is_of_no_matter(tmp_path: Path) -> None:
    single = single_experts()
    removals = sets(single, "highest")
    one = run_with(tmp_path / "one", single, removals)
    mixed = pd.concat([removals, single]).sample(frac=1, random_state=0)
    two = run_with(tmp_path / "two", mixed.iloc[:50], mixed.iloc[50:])
    assert repr(importance(one, 1, QUESTION)[1]) == repr(importance(two, 1, QUESTION)[1])
    for name in ("progressive", "redistribution"):
        for this, that in zip(getattr(work(one), name)(1), getattr(work(two), name)(1), strict=True):
            pd.testing.assert_frame_equal(this, that, check_exact=True)


def test_pairs_that_stay_behind_give_the_pooled_lines_of_all_pairs_at_hand(tmp_path: Path) -> None:
    folder = run_with(tmp_path, single_experts())
    files, metrics = EffectFiles(folder.url, folder.files("effects")), METRICS
    studies, lines = [], dict[str, list[LayerLines]]()
    for layer in LAYERS:
        active = active_experts(files.frame(layer, COLUMNS, ZERO.rows()))
        noise = files.frame(layer, ["document", *EFFECT_OUTCOMES], pc.field("unit") == "identity")
        cell = Cell(model="stub", layer=layer, intervention="zero", scope="token")
        studies += study_layer(active, metrics, noise, cell, QUESTION)
        for candidate in importance(folder, layer, QUESTION)[0]:
            lines.setdefault(str(candidate.keys[0]["metric"]), []).append(candidate)
    whole = importance_tables(studies, QUESTION)["pooled"]
    fetched: list[int] = []

    def fetch(found: LayerLines) -> LayerLines:
        fetched.append(found.layer)
        return found

    rows = [
        row
        for layers in lines.values()
        for row in pooled_rows([partial(fetch, found) for found in layers], QUESTION.settings)
    ]
    pd.testing.assert_frame_equal(pooled_table(rows), whole, check_exact=True)
    assert len(whole) == len(rows) > 8
    assert set(fetched) == set(LAYERS)


def test_a_layer_whose_own_effects_were_given_up_has_its_progressive_study(tmp_path: Path, ray_cluster: None) -> None:
    single = single_experts()
    folder = run_with(tmp_path, single[single["layer"] == 1], sets(single, "highest"))
    found = results(folder, importance=IMPORTANCE, progressive=PROGRESSIVE, redistribution=True)
    assert set(found["cells.parquet"]["layer"].to_pylist()) == {1}
    assert set(found["redistribution.parquet"]["layer"].to_pylist()) == {1}
    assert set(found["weight_and_gap.parquet"]["layer"].to_pylist()) == {1}
    assert set(found["progressive.parquet"]["layer"].to_pylist()) == {1, 3}


def test_sets_that_are_in_no_order_are_no_progressive_ablation(tmp_path: Path, ray_cluster: None) -> None:
    single = single_experts()
    listed = sets(single, "listed").assign(parameter=None)
    means = sets(single, "highest").assign(intervention="mean")
    folder = run_with(tmp_path / "one", single, listed, means, sets(single, "highest", layers=(1,)))
    found = results(folder, progressive=PROGRESSIVE)
    assert set(found) == {"progressive.parquet", "areas.parquet"}
    assert set(found["progressive.parquet"]["layer"].to_pylist()) == {1}
    assert results(run_with(tmp_path / "two", single, listed, means), progressive=PROGRESSIVE) == {}


def test_without_metrics_what_needs_none_is_made(tmp_path: Path, ray_cluster: None) -> None:
    folder = run_with(tmp_path, single_experts())
    found = results(folder, metrics=None, importance=IMPORTANCE, redistribution=True)
    assert set(found) == {"redistribution.parquet", "weight_and_gap.parquet", "gap_depth.parquet"}


def test_experts_that_were_active_nowhere_have_no_redistribution(tmp_path: Path, ray_cluster: None) -> None:
    single = single_experts()
    inactive = single.assign(slot=None)
    assert work(run_with(tmp_path / "one", inactive)).redistribution(1) is None
    assert results(run_with(tmp_path / "two", inactive), redistribution=True) == {}


def test_what_was_not_asked_for_is_not_made(tmp_path: Path, ray_cluster: None) -> None:
    single = single_experts()
    assert results(run_with(tmp_path, single, sets(single, "highest"))) == {}


@pytest.mark.parametrize("row_group", [7, 1 << 20])
def test_contrasts_come_in_their_order_whatever_is_held_at_a_time(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    """Against the table that is made of all contrasts at once."""
    single = single_experts()
    other = single[single["unit"] == "expert"].assign(intervention="scale", parameter=np.float32(0.8))
    folder = run_with(tmp_path, single, other)
    monkeypatch.setattr(studies_module, "_CONTRAST_ROWS", row_group)
    found = results(folder, importance={**IMPORTANCE, "contrasts": True})["contrasts.parquet"]
    parts = [len(chunk) for chunk in found["layer"].chunks]
    assert (len(parts) > 1) == (row_group == 7)
    assert all(size % row_group == 0 for size in parts[:-1])
    frame = found.to_pandas()
    assert set(frame["intervention"]) == {"zero", "scale(0.8)"}
    pd.testing.assert_frame_equal(frame, frame.sort_values([*CONTRASTS], ignore_index=True))
    cells = results(folder, importance=IMPORTANCE)["cells.parquet"].to_pandas()
    tested = cells[cells["label"] != "identity"]
    assert len(frame) == (tested["n"] + tested["dropped_nonfinite"]).sum()


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
        files = EffectFiles(folder.url, folder.files("effects"))
        found.append(make_studies(folder, files, config, "stub", None, NO_LAYERS, NO_FLOOR))
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


def test_a_run_whose_prunings_were_all_given_up_has_no_verdicts(tmp_path: Path, ray_cluster: None) -> None:
    assert results(run_with(tmp_path, single_experts()), redundancy={}) == {}
