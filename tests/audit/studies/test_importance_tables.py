"""The tables of the importance audit: the same bytes in any order, and the same cells from the contrasts written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_effects import made_effects, made_metrics, made_noise, plain_pairs

from audit.statistics.cells import Settings
from audit.studies.active_experts import active_experts
from audit.studies.contrasts import cells_of, pooled_of, read_contrasts
from audit.studies.importance import CandidateStudy, Cell, Question, study_layer
from audit.studies.importance_tables import importance_tables

LAYERS = (0, 2)
QUESTION = Question(
    random_rankings=19,
    outcomes=("delta_loss", "kl"),
    contrasts=True,
    settings=Settings(bootstrap_draws=100),
)
RNG = np.random.default_rng(3)
VALUES = {layer: RNG.random((3, 12)) for layer in LAYERS}


def layer_effects(layer: int) -> pd.DataFrame:
    """The layers are audited at the same tokens."""
    rows = made_effects(layer, strength=0.3)
    rows.loc[[3, 77], "kl"] = np.inf
    return rows


def layer_metrics(layer: int) -> pd.DataFrame:
    use, reap, aimer = VALUES[layer]
    return pd.concat(
        [
            made_metrics(layer, {"utilization": (use * 4).round()}, label="published"),
            made_metrics(layer, {"reap": reap}),
            made_metrics(layer, {"aimer": aimer}, orientation=-1),
        ]
    )


def studies(order: int | None = None, question: Question = QUESTION) -> list[CandidateStudy]:
    """Of every layer; with ``order``, every table that goes in is shuffled, and so is what they give."""
    metrics = pd.concat(map(layer_metrics, LAYERS))
    found = []
    for layer in LAYERS:
        rows, noise = layer_effects(layer), made_noise(layer)
        if order is not None:
            rows, noise, metrics = (frame.sample(frac=1, random_state=order) for frame in (rows, noise, metrics))
        cell = Cell(model="m", layer=layer, intervention="zero", scope="token")
        found += study_layer(active_experts(rows), metrics, noise, cell, question)
    return found if order is None else [found[i] for i in np.random.default_rng(order).permutation(len(found))]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return importance_tables(studies(), QUESTION)


def written(frame: pd.DataFrame) -> tuple[bytes, str]:
    parquet = io.BytesIO()
    frame.to_parquet(parquet, index=False)
    return parquet.getvalue(), frame.to_csv(index=False)


@pytest.mark.parametrize("order", [1, 2])
def test_neither_the_order_of_layers_nor_of_rows_changes_a_byte(tables: dict[str, pd.DataFrame], order: int) -> None:
    shuffled = importance_tables(studies(order), QUESTION)
    assert list(shuffled) == ["cells", "pooled", "correlations", "controls", "contrasts"]
    for name, table in tables.items():
        assert len(table)
        assert written(shuffled[name]) == written(table), name


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_contrasts_give_the_same_cells_and_pooled_lines(
    tables: dict[str, pd.DataFrame], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"contrasts.{ending}"
    contrasts = tables["contrasts"].sample(frac=1, random_state=0)
    contrasts.to_csv(path, index=False) if ending == "csv" else contrasts.to_parquet(path, index=False)
    read = read_contrasts(path)
    # What a contrast table does not hold: the permutations, the identity rows, tokens without a pair, orientation.
    unknown = [name for name in tables["cells"] if name.startswith("p_permutation")]
    unknown += ["noise_floor", "ties", "orientation", "verdict", "reason", "notes", "n_to_decide"]
    ours = tables["cells"].query("label != 'identity'").drop(columns=unknown).reset_index(drop=True)
    theirs = cells_of(read, QUESTION.settings)
    assert theirs["notes"].str.contains("p_permutation: not computed; noise_floor: not measured").all()
    pd.testing.assert_frame_equal(theirs.drop(columns=unknown), ours, check_exact=True)
    pooled = pooled_of(read, QUESTION.settings).drop(columns="orientation")
    pd.testing.assert_frame_equal(pooled, tables["pooled"].drop(columns="orientation"), check_exact=True)


def test_a_contrast_is_a_pair_of_the_cell(tables: dict[str, pd.DataFrame]) -> None:
    rows = layer_effects(2)
    use = dict(enumerate((VALUES[2][0] * 4).round()))
    expected, _ = plain_pairs(rows, rows["expert"].map(use), "kl")
    found = tables["contrasts"].query("layer == 2 and metric == 'utilization' and outcome == 'kl'")
    assert found["expert_high"].isna().any()  # several tied
    for end in ("expert_high", "expert_low"):
        assert found[end].fillna(-1).astype(int).tolist() == expected[end].tolist()
    for name in ("document", "sequence", "position", "effect_high", "effect_low"):
        np.testing.assert_allclose(found[name].astype(float), expected[name].astype(float))
    assert np.isinf(expected[["effect_high", "effect_low"]]).any(axis=None)


def test_a_pooled_line_is_the_mean_over_layers_within_a_token(tables: dict[str, pd.DataFrame]) -> None:
    line = tables["pooled"].set_index(["metric", "outcome"]).loc[("aimer", "delta_loss")]
    scaled = []
    for layer in LAYERS:
        rows = layer_effects(layer)
        pairs, _ = plain_pairs(rows, rows["expert"].map(dict(enumerate(-VALUES[layer][2]))), "delta_loss")
        pairs = pairs.set_index(["sequence", "position"])
        diff = pairs["effect_high"] - pairs["effect_low"]
        scaled.append(diff / diff.std())
    by_token = pd.concat(scaled, axis=1).mean(axis=1)
    assert line["mean_d"] == pytest.approx(by_token.mean())
    assert (line["layers"], line["positions"], line["documents"]) == (2, len(by_token), 20)
    assert (line["label"], line["orientation"]) == ("extended", -1)


def test_families_are_the_labels_over_the_layers(tables: dict[str, pd.DataFrame]) -> None:
    cells = tables["cells"].query("outcome == 'delta_loss'")
    size = cells.groupby("label")["family_size"].unique().map(list).to_dict()
    # Published: one metric; extended: two; control: three predictors and two negative controls; each at two layers.
    assert size == {"published": [2], "extended": [4], "control": [10], "identity": [2]}
    held = tables["cells"]["label"].isin(["published", "extended"])  # delta_loss and kl are the confirmatory outcomes
    assert (tables["cells"]["p_holm_confirmatory"].notna() == held).all()


def test_controls_say_how_often_rankings_that_know_nothing_are_significant(tables: dict[str, pd.DataFrame]) -> None:
    controls = tables["controls"]
    assert len(controls) == 2 * len(LAYERS) * len(QUESTION.outcomes)
    assert set(controls["metric"]) == {"random_token", "random_ranking"}
    assert (controls["rankings"] == 19).all()
    share = controls["rejection_rate"]
    assert np.allclose(controls["monte_carlo_error"], np.sqrt(share * (1 - share) / 19))


def test_contrasts_are_left_out_unless_asked_for() -> None:
    question = Question(random_rankings=5, outcomes=("kl",), settings=Settings(bootstrap_draws=100))
    assert "contrasts" not in importance_tables(studies(question=question), question)
