"""Results are a function of what is committed: of no number of CPUs, no order, and no earlier results."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from shapes import Call, Cluster
from transformers import MixtralConfig, MixtralForCausalLM

from audit.runfolder import RunFolder

EXPECTED = {
    "layers.parquet", "experts.parquet", "noise_floor.parquet", "metrics.parquet", "reduced.json",
    "cells.parquet", "cells.csv", "pooled.parquet", "correlations.parquet", "controls.parquet", "contrasts.parquet",
    "findings.md", "progressive.parquet", "areas.parquet", "redistribution.parquet", "gap_depth.parquet",
    "weight_and_gap.parquet", "redundancy.parquet", "redundancy_verdicts.parquet",
}  # fmt: skip


def results_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "results").iterdir()}


@pytest.fixture(scope="module")
def as_run(studied: Path) -> dict[str, bytes]:
    """What the run itself wrote, on as many CPUs as this machine has."""
    return results_of(studied)


def test_every_result_is_there(as_run: dict[str, bytes]) -> None:
    assert set(as_run) == EXPECTED


def renamed(run: Path, to: Path, seed: int) -> Path:
    """A copy of a run whose commits have other names, and so another order."""
    shutil.copytree(run, to)
    manifests = sorted((to / "manifests").glob("*.json"))
    for place in np.random.default_rng(seed).permutation(len(manifests)):
        old = manifests[place].stem
        new = f"c-{place:04d}{old[-6:]}"
        text = manifests[place].read_text()
        for table in ("effects", "tokens", "pruning"):
            if (to / table / old).exists():
                (to / table / old).rename(to / table / new)
        manifests[place].unlink()
        (to / "manifests" / f"{new}.json").write_text(text.replace(old, new))
    return to


@pytest.mark.parametrize("cpus", [*(pytest.param(n, marks=pytest.mark.full) for n in (1, 2)), 4])
def test_any_number_of_cpus_and_any_order_of_commits_gives_the_same_bytes(
    place: Path, studied: Path, as_run: dict[str, bytes], cluster: Cluster, call: Call, tmp_path: Path, cpus: int
) -> None:
    """From nothing, over results that are there, and by the run command where one of them was lost."""
    run = renamed(studied, tmp_path / "run", seed=cpus)
    assert RunFolder(str(run)).done() == RunFolder(str(studied)).done()
    command: tuple[object, ...] = ("reduce", run)
    if cpus == 1:
        shutil.rmtree(run / "results")
    elif cpus == 2:
        for path in (run / "results").iterdir():
            path.write_bytes(b"old")
    else:
        (run / "results" / "gap_depth.parquet").unlink()
        command = ("run", place / "audit.yaml", "--out", run)
    with cluster(cpus):
        assert ray.cluster_resources()["CPU"] == cpus
        status, out, _ = call(*command)
    assert status == 0
    assert results_of(run) == as_run
    if command[0] == "reduce":
        assert all(name in out for name in EXPECTED - {"reduced.json"})


def test_redistribution_is_what_the_effects_say(studied: Path) -> None:
    """Against a plain loop over the effect table."""
    folder = RunFolder(str(studied))
    effects = folder.dataset("effects").to_table().to_pandas()
    single = effects[(effects["unit"] == "expert") & (effects["intervention"] == "zero")].astype(
        {"gap_norm": float, "remainder_norm": float, "gap_cosine": float}
    )
    table = folder.read_table("redistribution").to_pandas().set_index(["layer", "quantity"])
    profile = []
    for layer, rows in single.groupby("layer"):
        profile.append(np.mean([row.gap_norm for row in rows.itertuples()]))
        shares = [row.remainder_norm * max(row.gap_cosine, 0.0) / row.gap_norm for row in rows.itertuples()]
        assert table.loc[(layer, "gap_norm"), "mean"] == pytest.approx(profile[-1], rel=1e-12)
        assert table.loc[(layer, "relative_compensation"), "mean"] == pytest.approx(np.mean(shares), rel=1e-6)
        assert table.loc[(layer, "relative_compensation_shared"), "reason"] == "the layer has no shared experts"
        assert table.loc[(layer, "gap_norm"), "n"] == len(rows)
    depth = folder.read_table("gap_depth").to_pandas().set_index("statistic")
    ranks = np.argsort(np.argsort(profile)) + 1
    assert depth.loc["mean", "rho"] == pytest.approx(np.corrcoef([1, 2, 3], ranks)[0, 1])
    weights = folder.read_table("weight_and_gap").to_pandas()
    assert weights["layer"].tolist() == [0, 1, 2]
    assert weights["n"].tolist() == [rows["expert"].nunique() for _, rows in single.groupby("layer")]


def test_the_progressive_study_is_made_where_it_was_asked_for(studied: Path) -> None:
    points = RunFolder(str(studied)).read_table("progressive").to_pandas()
    assert set(points["layer"]) == {0, 2}
    assert set(points["order"]) == {"highest", "lowest", "random", "ranked:reap"}
    assert set(points["count"]) == {1, 2}
    assert set(points["tokens"]) == {40}
    assert set(points.loc[points["order"] == "random", "draws"]) == {2}


def test_redundancy_verdicts_stand_in_the_order_of_the_model(studied: Path) -> None:
    verdicts = RunFolder(str(studied)).read_table("redundancy_verdicts").to_pandas()
    places = ["layer 0", "layer 1", "layer 2", "early third", "middle third", "late third", "all layers"]
    assert verdicts["where"].tolist() == [place for place in places for _ in range(2)]
    assert verdicts["share"].tolist() == [0.25, 0.5] * 7
    assert (verdicts["draws"] == 5).all()
    assert verdicts["descriptive"].all()
    assert (verdicts["documents"] == 6).all()


def test_what_was_found_is_printed_and_what_is_not_is_said(place: Path, studied: Path, call: Call) -> None:
    status, out, _ = call("run", place / "audit.yaml", "--out", studied)
    assert status == 0
    folder = RunFolder(str(studied))
    assert "Verdicts by metric and outcome" in out
    cells = folder.read_table("cells").to_pandas()
    left_out = int((cells["outcome"] == "tv").sum())
    assert f"{left_out} cells of outcomes that are not confirmatory in {studied}/results/cells.csv" in out
    assert "Negative controls" in out
    assert "Are pruning criteria interchangeable?" in out
    verdict = folder.read_table("redundancy_verdicts").to_pandas().iloc[-1]
    assert f"{verdict['verdict']} {verdict['low']:.2f} to {verdict['high']:.2f}" in out
    assert "Experts removed until the mean delta_loss exceeds 0.1 nat" in out
    assert "Redistribution: means over tokens and experts" in out
    # four orders, two counts, two layers; none of these sets has a table of its own
    assert f"mean effects of 16 sets of experts in {studied}/results/layers.parquet" in out
    assert "Mean effect per layer: zero, every active expert by itself, scope token" in out
    assert "highest" not in out.partition("Mean effect per layer")[2]


def test_status_and_plan_know_the_stages_of_the_studies(place: Path, studied: Path, call: Call) -> None:
    status, out, _ = call("status", studied)
    assert status == 0
    for stage in ("observe", "merge", "effects", "progressive", "pruning"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"│ {stage} ")]
        assert "100%" in line
    status, out, _ = call("plan", place / "audit.yaml")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("│ pruning ")]
    # two metrics both ways and five draws, at two shares, seven places and six documents
    assert int(line.split("│")[3]) == (2 * 2 + 5) * 2 * 7 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("studies.importance.metrics=[raep]", "studies.importance.metrics: 'raep' is unknown; known are utilization"),
        ("studies.progressive.metrics=[raep]", "studies.progressive.metrics: 'raep' is unknown"),
        ("studies.progressive.layers=[0,5]", "studies.progressive.layers: 5 is not audited; the layers are 0-2"),
        ("studies.importance.outcomes=[kl]", "studies.importance.confirmatory: 'delta_loss' is not among the outcomes"),
        ("interventions=[{target: all}]", "studies.importance: it compares the experts of a token one by one"),
        ("interventions=[{kind: mean}]", "studies.redistribution: True needs effects of zero on single experts"),
        ("interventions=[{}, {target: {highest: 1}}]", "studies.progressive: it measures target highest, zero, param"),
        ("scope=sequence", "attribution: True has no meaning for scope sequence"),
        ("studies.redundancy.shares=[0.1]", "studies.redundancy.shares: 0.1 of the 8 experts of layer 0 removes none"),
        ("studies.redundancy.shares=[0.9]", "studies.redundancy.shares: 7 of 8 experts cannot be removed, a token is"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, call: Call, change: str, message: str
) -> None:
    status, out, err = call("run", place / "audit.yaml", "--out", tmp_path / "new", "--set", change)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"moe-audit: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_released_code_is_refused_for_a_family_that_has_none(tmp_path: Path, place: Path, call: Call) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    config = MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=3, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(model)
    given = ("--set", f"model.source={model}")
    status, out, err = call("run", place / "audit.yaml", "--out", tmp_path / "new", *given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("moe-audit: studies.importance.released_code: model.source: family 'mixtral' has no released")
    assert list(tmp_path.iterdir()) == [model]


def test_a_run_of_another_model_is_not_compared_with_published_figures(studied: Path, call: Call) -> None:
    status, out, err = call("compare", studied, "--published", "OLMoE-1B-7B-0924")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("moe-audit: --published: 'OLMoE-1B-7B-0924' has layers 16, the run's model ")
    assert not (studied / "results" / "side_by_side.csv").exists()
