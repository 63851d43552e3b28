"""The published configurations, from the command line to the side-by-side table, on tiny checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import s3fs
from s3_server import BUCKET, s3_server
from shapes import Call

# The tiny checkpoints are those of the tests of audit.published.
sys.path += [str(Path(__file__).parents[1] / "audit"), str(Path(__file__).parents[1] / "audit" / "published")]

from tiny import tiny_checkpoint

from audit.published.figures import METRICS, MODELS, model_facts, published_cells, published_gap_norm
from audit.runfolder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs" / "published"
MAIN = dict(zip(("olmoe", "qwen1_5_moe", "deepseek_v2_lite"), MODELS, strict=True))
CONTROLS = {"routing_weight", "contribution_norm", "random_token", "random_ranking"}
# What the test machine changes and nothing else: where weights and text come from, and how much of either.
SMALLER = (
    "model.dtype=float32",
    "positions.sample=16",
    "studies.importance.random_rankings=19",
    "studies.importance.bootstrap_draws=100",
    "studies.redundancy.shares=[0.5]",
    "studies.redundancy.draws=1",
    "studies.redundancy.documents=2",
    "studies.redundancy.metrics=[reap, utilization]",
    "studies.redundancy.bootstrap_draws=100",
    "cluster.max_groups=1",
    "cluster.task_minutes=60",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen1_5_moe" else pytest.mark.full) for name in MAIN]
)
def test_a_published_configuration_runs_to_its_table(name: str, tmp_path: Path, call: Call, ray_cluster: None) -> None:
    model, run = MAIN[name], tmp_path / "run"
    tiny_checkpoint(model, tmp_path / "model")
    lines = [f"The expert number {n} answers what another expert was asked about the weather." for n in range(4)]
    (tmp_path / "text.txt").write_text("\n".join([*lines, "too short"]))
    text = f"{{kind: text, path: {tmp_path}/text.txt, domain: wikipedia, per_line: true, min_characters: 50}}"
    settings = (*SMALLER, f"model.source={tmp_path}/model", f"corpus.sources=[{text}]")
    given = [part for setting in settings for part in ("--set", setting)]
    status, out, err = call("run", CONFIGS / f"{name}.yaml", "--out", run, "--display", "none", *given)
    assert status == 0, err

    folder, layers = RunFolder(str(run)), model_facts()[model]["published_layers"]["value"]
    cells = folder.read_table("cells").to_pandas()
    loss = cells[cells["outcome"] == "delta_loss"]
    for label, metrics in (
        ("published", set(METRICS)),
        ("published_code", {f"released_{metric}" for metric in METRICS}),
        ("control", CONTROLS),
    ):
        found = loss[loss["label"] == label]
        assert set(zip(found["layer"], found["metric"], strict=True)) == {(n, m) for n in layers for m in metrics}
        assert len(found) == len(layers) * len(metrics)
    assert set(cells["scope"]) == {"sequence"}
    tested = loss[loss["label"] == "published"]
    assert set(tested.loc[tested["p_t"].notna(), "family_size"]) == {int(tested["p_t"].notna().sum())}
    # Fewer than 16: the last token of a text has no loss, and experts may tie.
    assert tested["n"].between(8, 16).all()
    assert {"redistribution", "gap_depth", "redundancy_verdicts"} <= {p.stem for p in (run / "results").iterdir()}

    status, out, err = call("compare", run, "--published", model)
    assert (status, err) == (0, "")
    table = pd.read_csv(run / "results" / "side_by_side.csv")
    parts = {part: rows.set_index(["layer", "metric"]) for part, rows in table.groupby("part")}
    assert {"cells", "cells of the released code", "control"} <= set(parts)
    mine = {(row.layer, row.metric): row.cohen_d for row in loss.itertuples()}
    theirs = published_cells(model).set_index(["layer", "metric"])
    for part, prefix in (("cells", ""), ("cells of the released code", "released_")):
        assert len(parts[part]) == 20
        for (layer, metric), row in parts[part].iterrows():
            assert row["cohen_d"] == pytest.approx(mine[layer, f"{prefix}{metric}"], nan_ok=True)
            assert row["published_d"] == theirs.loc[(layer, metric), "cohen_d"]
    for (layer, _), row in parts["control"].iterrows():
        assert row["cohen_d"] == pytest.approx(mine[layer, "routing_weight"], nan_ok=True)
    if model in set(published_gap_norm()["model"]):
        assert set(parts["gap norm"].dropna(subset="gap_norm").index.get_level_values("layer")) == set(layers)
    judged = parts["cells"]["agrees"].dropna().astype(bool)
    assert f"cells: {judged.sum()} of {len(judged)} compared rows agree" in out

    other = next(m for m in MODELS if m != model)
    status, _, err = call("compare", run, "--published", other)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"moe-audit: --published: {other!r} has ")
    status, _, err = call("compare", run, "--published", "GPT-5")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("moe-audit: --published: 'GPT-5' was not published; published are OLMoE-1B-7B-0924, ")


@pytest.mark.full
def test_progressive_ablation_is_compared(tmp_path: Path, call: Call) -> None:
    model, run = MAIN["olmoe"], tmp_path / "run"
    tiny_checkpoint(model, tmp_path / "model")
    lines = [f"The expert number {n} answers what another expert was asked about the weather." * 2 for n in range(4)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    settings = (
        *(setting for setting in SMALLER if setting.startswith(("model.", "cluster."))),
        f"model.source={tmp_path}/model",
        f"corpus.sources=[{{kind: text, path: {tmp_path}/text.txt, domain: wikipedia, per_line: true}}]",
        "layers=[9, 15]",
        "positions.sample=4",
        "studies.progressive.positions=4",
        "studies.progressive.draws=2",
        "studies.progressive.metrics=[reap]",
    )
    given = [part for setting in settings for part in ("--set", setting)]
    status, _, err = call("run", CONFIGS / "olmoe_progressive.yaml", "--out", run, "--display", "none", *given)
    assert status == 0, err
    status, out, err = call("compare", run, "--published", model)
    assert (status, err) == (0, "")
    assert "progressive ablation: " in out
    table = pd.read_csv(run / "results" / "side_by_side.csv")

    with s3_server():  # the same from an object store
        s3fs.S3FileSystem().put(str(run), f"{BUCKET}/run", recursive=True)
        status, again, err = call("compare", f"s3://{BUCKET}/run", "--published", model)
        assert (status, err) == (0, "")
        assert again.replace(f"s3://{BUCKET}/run", str(run)) == out
        stored = s3fs.S3FileSystem().cat(f"{BUCKET}/run/results/side_by_side.csv")
        assert stored == (run / "results" / "side_by_side.csv").read_bytes()
    found = table[table["part"] == "progressive ablation"].set_index(["layer", "count"])
    assert set(found.index) == {(layer, count) for layer in (0, 1, 7, 8, 9, 15) for count in range(1, 8)}
    effects = RunFolder(str(run)).dataset("effects").to_table().to_pandas()
    for layer in (9, 15):
        for count in range(1, 8):
            rows = [
                (row.sequence, row.position, row.delta_loss)
                for row in effects.itertuples()
                if row.layer == layer and row.unit == "set" and row.target == "highest" and row.parameter == count
            ]
            losses = [loss for _, _, loss in rows if loss == loss]  # NaN at the last token of a text
            assert len(rows) == len({row[:2] for row in rows}) == 4
            assert found.loc[(layer, count), "n"] == len(losses) > 0
            assert found.loc[(layer, count), "mean"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert (found.loc[[0, 1, 7, 8], "n"] == 0).all()
    assert found.loc[[0, 1, 7, 8], "reason"].str.startswith("0 documents with this removal").all()
