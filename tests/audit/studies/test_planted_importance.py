"""The whole audit on a model in which it is known what matters: what must be found is, what must not is not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
import pytest
from planted import EXPERTS, LAYERS, planted_model

from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models import prepare
from audit.models.weights import weight_metrics
from audit.statistics.cells import Settings, cell_table
from audit.studies.active_experts import COLUMNS, active_experts
from audit.studies.importance import CandidateStudy, Cell, Question, study_layer
from audit.studies.importance_tables import importance_tables
from audit.studies.observed import metric_table

CALIBRATION, AUDITED = 24, 36  # documents
RANKINGS = 200


@cache
def measured(seed: int) -> tuple[Mapping[int, int], pd.DataFrame, pd.DataFrame]:
    """(planted expert of each layer, metrics of the calibration documents, effects in the audited ones)."""
    planted = planted_model(seed, documents=CALIBRATION + AUDITED)
    calibration, audited = planted.sequences[:CALIBRATION], planted.sequences[CALIBRATION:]
    model = validate(prepare(planted.module))
    engine = Engine(model, memory=2**62)
    metrics = metric_table(engine.observe(calibration).observations, weight_metrics(model))
    found = engine.measure(
        audited,
        [np.arange(1, len(sequence.token_ids)) for sequence in audited],
        layers=range(LAYERS),
        interventions=[Intervention("zero")],
        attribution=True,
    )
    return planted.experts, metrics[metrics["domain"].isna()], found.effects.to_pandas()


def study(effects: pd.DataFrame, metrics: pd.DataFrame, layer: int, question: Question) -> list[CandidateStudy]:
    rows = effects[effects["layer"] == layer]
    single, noise = (rows[rows["unit"] == unit] for unit in ("expert", "identity"))
    cell = Cell(model="planted", layer=layer, intervention="zero", scope="token")
    return list(study_layer(active_experts(single[list(COLUMNS)]), metrics, noise, cell, question))


def check_what_is_known(seed: int, rankings: int) -> None:
    """The verdicts of the controls at every layer, as the audit gives them with all metrics beside."""
    experts, metrics, effects = measured(seed)
    question = Question(
        outcomes=("delta_loss", "kl"), random_rankings=rankings, settings=Settings(bootstrap_draws=500, seed=seed)
    )
    tables = importance_tables(
        [found for layer in range(LAYERS) for found in study(effects, metrics, layer, question)], question
    )
    cells = tables["cells"].set_index(["metric", "outcome", "layer"]).sort_index()
    assert (cells["documents"].drop("identity") == AUDITED).all()
    for layer in range(LAYERS):
        one = effects[(effects["layer"] == layer) & (effects["unit"] == "expert")]
        assert one.groupby("expert")["kl"].mean().idxmax() == experts[layer]
        for metric, outcome in (("attribution", "delta_loss"), ("contribution_norm", "kl")):
            cell = cells.loc[(metric, outcome, layer)]
            assert cell["verdict"] == "predicts", (metric, layer, cell["reason"])
            assert cell["p_permutation"] == 1 / (rankings + 1)
        for outcome in question.outcomes:
            cell = cells.loc[("random_token", outcome, layer)]
            assert cell["verdict"] in ("undecided", "practically null"), (outcome, layer, cell["reason"])
    controls = tables["controls"].set_index(["metric", "outcome"])["rejection_rate"].sort_index()
    # Eight rates, each of as many rankings: four Monte-Carlo standard errors of their mean.
    assert abs(controls.loc["random_token"].mean() - 0.05) <= 4 * np.sqrt(0.05 * 0.95 / (8 * rankings))
    assert controls.loc["random_ranking"].min() > 0.25  # what p_permutation is for: a t test alone would reject these


def check_arbitrary_rankings(seed: int, layers: int) -> None:
    """200 rankings, each a metric in a family of its own: corrected for nothing, they get every chance to predict."""
    _, _, effects = measured(seed)
    rng = np.random.default_rng([seed, 7])
    question = Question(
        outcomes=("kl",), random_rankings=999, settings=Settings(bootstrap_draws=100, seed=seed, confirmatory=("kl",))
    )
    found = []
    for layer in range(layers):
        metrics = pd.DataFrame(
            {
                "layer": layer,
                "expert": np.tile(np.arange(EXPERTS), RANKINGS),
                "metric": np.repeat([f"ranking {number}" for number in range(RANKINGS)], EXPERTS),
                "value": np.concatenate([rng.permutation(EXPERTS) for _ in range(RANKINGS)]).astype(float),
                "orientation": 1,
            }
        )
        metrics["label"] = metrics["metric"]
        cells = cell_table(
            [row for found in study(effects, metrics, layer, question) for row in found.cells], question.settings
        )
        cells = cells[cells["metric"].str.startswith("ranking ")]
        assert (cells["alpha_corrected"] == 0.05).all()
        found.append(cells)
    cells = pd.concat(found)
    assert len(cells) == layers * RANKINGS
    # Three Monte-Carlo standard errors: of the rankings, and of the 999 permutations that those of a layer share.
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 * (1 / len(cells) + 1 / (999 * layers)))
    assert (cells["p_permutation"] < 0.05).mean() <= most
    assert cells["verdict"].isin(["predicts", "reversed"]).mean() <= most
    assert (cells["p_t"] < 0.05).mean() > 0.5


def test_what_carries_the_answer_is_found_at_every_layer_and_a_random_order_nowhere() -> None:
    check_what_is_known(0, rankings=199)


def test_few_of_200_arbitrary_rankings_predict_though_most_are_significant() -> None:
    check_arbitrary_rankings(0, layers=2)


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_other_planted_models(seed: int) -> None:
    check_what_is_known(seed, rankings=999)
    check_arbitrary_rankings(seed, layers=LAYERS)
