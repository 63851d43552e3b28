"""The reducer in bounded memory: what is read at a time, what runs at a time, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from stub_worker import LAYERS, tables

from audit.effects import EFFECTS
from audit.runfolder import Manifest, RunFolder
from audit.studies import summary
from cluster.driver.driver import RunError
from cluster.results import layer_rows, layer_tasks, reducer
from cluster.results import studies as studies_module
from cluster.results.layer_rows import EffectFiles, by_layer
from cluster.results.parquet_sink import encoded
from cluster.tasks import Task

TASKS = 12


@pytest.fixture(scope="module")
def effects() -> list[pa.Table]:
    """What tasks gave; the seventh has no rows of the layer 3, and every effect of every second one was repeated."""
    made = []
    for number in range(TASKS):
        task = Task(id=f"effects-{number:04d}", kind="measure", positions=(np.arange(1, 20),), layers=LAYERS)
        frame = tables(task)["effects"].to_pandas()
        frame = frame[(frame["layer"] != 3) | (number != 6)].assign(repeated=number % 2 == 0)
        again = {f"repeat_{name}": frame[name] * np.float32(1.01) for name in summary.COMPARED}
        made.append(pa.Table.from_pandas(frame.assign(**again), EFFECTS, preserve_index=False))
    return made


def written(path: Path, effects: list[pa.Table], *, by_layers: bool) -> RunFolder:
    """A run folder with a commit of every three tables."""
    folder = RunFolder(str(path))
    for number in range(0, TASKS, 3):
        name = f"effects/c-{number}/0.parquet"
        target = path / name
        target.parent.mkdir(parents=True)
        table = pa.concat_tables(effects[number : number + 3])
        if by_layers:
            target.write_bytes(encoded(table))
        else:
            pq.write_table(table, target, row_group_size=100)
        changes = {layer: (57, layer) for layer in LAYERS}
        folder.commit(Manifest(f"c-{number}", "r", {f"t-{number}": {"routing_changes": changes}}, {"effects": [name]}))
    folder.begin({"specification": {"studies": {"redistribution": True}}, "model": {"source": "stub"}})
    return folder


def files_of(folder: RunFolder) -> EffectFiles:
    return EffectFiles(folder.url, folder.files("effects"))


def test_no_row_group_holds_two_layers_and_no_row_is_lost(effects: list[pa.Table]) -> None:
    table = pa.concat_tables(effects)
    parts = list(by_layer(table))
    assert [set(part["layer"].to_pylist()) for part in parts] == [{layer} for layer in LAYERS]
    for layer, part in zip(LAYERS, parts, strict=True):
        assert part.equals(table.filter(pa.compute.equal(table["layer"], layer)))
    file = pq.ParquetFile(pa.BufferReader(encoded(table)))
    groups = [file.read_row_group(number)["layer"].to_pylist() for number in range(file.num_row_groups)]
    assert [set(group) for group in groups] == [{layer} for layer in LAYERS]
    assert sum(map(len, groups)) == len(table)
    assert list(by_layer(table[:0])) == [table[:0]]


def test_layers_are_found_without_reading_a_row_where_row_groups_say_them(
    tmp_path: Path, effects: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = files_of(written(tmp_path / "mixed", effects, by_layers=False))
    assert mixed.layers() == set(LAYERS)
    apart = files_of(written(tmp_path / "apart", effects, by_layers=True))
    monkeypatch.delattr(pq.ParquetFile, "read_row_group")
    assert apart.layers() == set(LAYERS)


def test_a_layer_is_read_in_batches_and_other_layers_row_groups_are_not(
    tmp_path: Path, effects: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_rows, "BATCH_ROWS", 50)
    decoded: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *given: Any, **named: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(self, *given, **named):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    whole = pa.concat_tables(effects)
    for by_layers in (True, False):
        files = files_of(written(tmp_path / str(by_layers), effects, by_layers=by_layers))
        decoded.clear()
        batches = list(files.batches(3, ["kl"]))
        assert max(map(len, batches)) <= 50
        assert sum(map(len, batches)) == whole["layer"].to_pylist().count(3)
        assert (sum(decoded) == sum(map(len, batches))) == by_layers


@pytest.mark.parametrize("by_layers", [True, False])
def test_summaries_are_the_same_however_little_is_held_at_a_time(
    tmp_path: Path, effects: list[pa.Table], monkeypatch: pytest.MonkeyPatch, by_layers: bool
) -> None:
    """Against sums over the whole table at once."""
    monkeypatch.setattr(layer_rows, "BATCH_ROWS", 7)
    monkeypatch.setattr(reducer, "_MERGE_ROWS", 20)
    whole = pa.concat_tables(effects)
    floor = summary.noise_floor([summary.noise_values(whole)], [{layer: (228, 4 * layer) for layer in LAYERS}])
    merged = summary.merge([summary.partial_sums(whole, floor)])
    files = files_of(written(tmp_path, effects, by_layers=by_layers))
    found = [reducer.summarize(files, layer, (228, 4 * layer)) for layer in LAYERS]
    assert pa.concat_tables(one.floor for one in found).equals(floor)
    assert pa.concat_tables(one.layers for one in found).equals(summary.layer_summary(merged))
    assert pa.concat_tables(one.experts for one in found).equals(summary.expert_summary(merged))
    assert min(row["repeats"] for row in floor.to_pylist()) > 100


def test_frames_come_in_one_order_with_words_in_the_order_of_the_alphabet(
    tmp_path: Path, effects: list[pa.Table]
) -> None:
    whole = pa.concat_tables(effects).to_pandas()
    expected = whole[(whole["layer"] == 3) & (whole["kl"] > 1e-3)].astype({"unit": str, "intervention": str})
    expected = expected.sort_values(["unit", "intervention", "sequence", "position", "expert"])
    for by_layers in (True, False):
        files = files_of(written(tmp_path / str(by_layers), effects, by_layers=by_layers))
        frame = files.frame(3, ["kl", "repeated"], pa.compute.field("kl") > 1e-3)
        assert frame["kl"].tolist() == expected["kl"].tolist()
        assert frame["unit"].astype(str).tolist() == expected["unit"].tolist()


def alone(markers: str, number: int) -> int:
    """How many of these tasks run now, this one included."""
    mine = Path(markers, str(number))
    mine.touch()
    time.sleep(0.3)
    running = len(list(Path(markers).iterdir()))
    mine.unlink()
    return running


def three() -> int:
    return 3


def largest_node() -> int:
    return int(max(node["Resources"]["memory"] for node in ray.nodes()))


@pytest.mark.parametrize(("share", "at_once"), [(0.6, 1), (0.4, 2)])
def test_tasks_run_side_by_side_only_as_far_as_memory_holds_them(
    tmp_path: Path, ray_cluster: None, share: float, at_once: int
) -> None:
    assert ray.cluster_resources()["CPU"] >= 3
    memory = int(share * largest_node())
    refs = [layer_tasks.start(f"task {i}", alone, str(tmp_path), i, memory=memory) for i in range(5)]
    assert max(layer_tasks.results(refs)) <= at_once


def test_what_no_node_can_hold_is_refused_before_it_starts(ray_cluster: None) -> None:
    most = largest_node()
    assert layer_tasks.results([layer_tasks.start("it", three, memory=most)]) == [3]
    with pytest.raises(RunError, match=r"^results: importance of layer 3 needs [\d,]+ MiB of memory in one process, "):
        layer_tasks.start("importance of layer 3", three, memory=most + 1)


def test_summaries_are_kept_where_a_study_is_refused(
    tmp_path: Path, effects: list[pa.Table], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' rows times the bytes of one exceed every node."""
    folder = written(tmp_path, effects, by_layers=True)
    rows = min(len(part) for part in by_layer(pa.concat_tables(effects)))
    monkeypatch.setattr(studies_module, "_REDISTRIBUTION_BYTES", 2 * largest_node() // rows)
    with pytest.raises(
        RunError, match=r"redistribution of layer 1 needs .* run `moe-audit reduce` where there is more"
    ):
        reducer.reduce(folder)
    assert set(folder.read_table("layers")["layer"].to_pylist()) == set(LAYERS)
    assert folder.read_result("reduced.json") is None
    assert not reducer.is_reduced(folder)
    monkeypatch.undo()
    assert "redistribution.parquet" in reducer.reduce(folder)
    assert reducer.is_reduced(folder)


def test_the_noise_of_a_layer_is_counted_in_what_its_task_may_take(
    tmp_path: Path, effects: list[pa.Table], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """57 identity rows in each of four manifests, and as many repeats."""
    folder = written(tmp_path, effects, by_layers=True)
    asked: dict[str, int] = {}
    start = layer_tasks.start

    def noted(what: str, *given: Any, memory: int) -> Any:
        asked[what] = memory
        return start(what, *given, memory=memory)

    monkeypatch.setattr(layer_tasks, "start", noted)
    monkeypatch.setattr(reducer, "_NOISE_BYTES", 1000)
    reducer.reduce(folder)
    base = layer_tasks.WORKER_BYTES + reducer._SUMMARY_BYTES
    assert {asked[f"layer {layer}"] for layer in LAYERS} == {base + 1000 * 2 * 4 * 57}
