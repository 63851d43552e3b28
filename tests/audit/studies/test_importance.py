"""The importance audit of one layer: the numbers of a plain loop, and a stated value or reason for odd data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_effects import TOKEN, made_effects, made_metrics, made_noise, plain_pairs
from scipy import stats

from audit.statistics.cells import Settings
from audit.studies.active_experts import OUTCOMES, active_experts
from audit.studies.importance import PREDICTED, CandidateStudy, Cell, Question, study_layer
from audit.studies.importance_tables import importance_tables

CELL = Cell(model="m", layer=3, intervention="zero", scope="token")
QUESTION = Question(random_rankings=39, settings=Settings(bootstrap_draws=100))
RNG = np.random.default_rng(17)
VALUES = {"utilization": RNG.integers(0, 2, 12).astype(float), "reap": RNG.random(12)}
NOTHING = made_metrics(3, {"reap": np.zeros(12)})[:0]


def study(
    rows: pd.DataFrame, metrics: pd.DataFrame, noise: pd.DataFrame | None = None, question: Question = QUESTION
) -> list[CandidateStudy]:
    noise = made_noise(0) if noise is None else noise
    return list(study_layer(active_experts(rows), metrics, noise, CELL, question))


def cells(found: list[CandidateStudy], question: Question = QUESTION) -> pd.DataFrame:
    return importance_tables(found, question)["cells"].set_index(["metric", "outcome"])


def score_of(rows: pd.DataFrame, metric: str) -> pd.Series:
    if metric in VALUES:
        return rows["expert"].map(dict(enumerate(VALUES[metric])))
    return rows["attribution"].abs() if metric == "abs_attribution" else rows[metric]


def test_every_cell_is_that_of_a_plain_loop_and_scipy() -> None:
    rows = made_effects(0, strength=0.4)
    rows.loc[[2, 90], "kl"] = np.nan
    rows = rows.drop(index=[8, 200, 201])  # ragged tokens
    table = cells(study(rows.sample(frac=1, random_state=0), made_metrics(3, VALUES)))
    ranked = dict.fromkeys(VALUES, OUTCOMES) | PREDICTED
    nonfinite = 0
    for metric, outcomes in ranked.items():
        for outcome in outcomes:
            cell = table.loc[(metric, outcome)]
            pairs, ties = plain_pairs(rows, score_of(rows, metric), outcome)
            diff = pairs["effect_high"] - pairs["effect_low"]
            finite = pairs[diff.notna()]
            nonfinite += len(pairs) - len(finite)
            assert cell["ties"] == ties
            assert (cell["n"], cell["dropped_nonfinite"]) == (len(finite), len(pairs) - len(finite)), (metric, outcome)
            assert cell["documents"] == finite["document"].nunique()
            for end in ("high", "low"):
                assert cell[f"experts_{end}"] == finite.loc[finite[f"expert_{end}"] >= 0, f"expert_{end}"].nunique()
            t = stats.ttest_rel(finite["effect_high"], finite["effect_low"])
            assert cell["mean_diff"] == pytest.approx(diff.mean())
            assert cell["cohen_d"] == pytest.approx(t.statistic / np.sqrt(len(finite)))
            assert cell["p_t"] == pytest.approx(t.pvalue)
            difference = diff[diff.notna() & (diff != 0)]
            assert cell["p_wilcoxon"] == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert table.loc[("utilization", "kl"), "ties"] > 0
    assert nonfinite > 0
    others = set(table.index.get_level_values("metric")) - set(ranked)
    assert others == {"random_token", "random_ranking", "identity"}


def test_there_is_a_cell_for_every_metric_and_outcome_and_none_for_what_a_predictor_cannot_say() -> None:
    table = cells(study(made_effects(1), made_metrics(3, VALUES)))
    expected = {(metric, outcome) for metric in (*VALUES, "random_token", "random_ranking") for outcome in OUTCOMES}
    expected |= {(metric, outcome) for metric, outcomes in PREDICTED.items() for outcome in outcomes}
    expected |= {("identity", outcome) for outcome in OUTCOMES if outcome != "gap_norm"}
    assert set(table.index) == expected
    assert ("contribution_norm", "gap_norm") not in expected  # under zero it is what it would predict
    labels = table.reset_index().groupby("metric")["label"].first().to_dict()
    expected_labels = dict.fromkeys((*PREDICTED, "random_token", "random_ranking"), "control")
    assert labels == dict.fromkeys(VALUES, "extended") | expected_labels | {"identity": "identity"}
    without = made_effects(1).assign(attribution=np.nan)
    names = set(cells(study(without, made_metrics(3, VALUES))).index.get_level_values("metric"))
    assert {"attribution", "abs_attribution"}.isdisjoint(names)


def test_a_metric_that_is_low_for_important_experts_is_its_own_negative() -> None:
    rows = made_effects(2, strength=0.5)
    plain = cells(study(rows, made_metrics(3, VALUES)))
    turned = {name: -value for name, value in VALUES.items()}
    low = cells(study(rows, made_metrics(3, turned, orientation=-1)))
    assert (low.loc[list(VALUES), "orientation"] == -1).all()
    pd.testing.assert_frame_equal(low.drop(columns="orientation"), plain.drop(columns="orientation"), check_exact=True)
    wrong = cells(study(rows, made_metrics(3, turned)))
    for outcome in OUTCOMES:
        ours, theirs = plain.loc[("reap", outcome)], wrong.loc[("reap", outcome)]
        assert theirs["mean_diff"] == pytest.approx(-ours["mean_diff"])
        assert theirs["p_permutation"] == ours["p_permutation"]  # the same set of rankings, the same |d|


def test_a_metric_without_orientation_is_ranked_by_its_value_and_never_predicts() -> None:
    rows = made_effects(3, tokens=240)
    rows["kl"] = rows["expert"] + rows["kl"] / 10
    truth = {"routing_gini": np.arange(12.0)}
    question = replace(QUESTION, random_rankings=99)
    open_cell = cells(study(rows, made_metrics(3, truth, orientation=0), question=question)).loc[("routing_gini", "kl")]
    claimed = cells(study(rows, made_metrics(3, truth), question=question)).loc[("routing_gini", "kl")]
    assert (claimed["verdict"], open_cell["verdict"]) == ("predicts", "associated")
    assert (claimed["orientation"], open_cell["orientation"]) == (1, 0)
    assert open_cell["mean_diff"] == claimed["mean_diff"] > 5


def test_an_expert_without_which_the_true_logit_falls_has_a_positive_effect() -> None:
    rows = made_effects(4)
    rows["delta_logit"] = np.where(rows["delta_logit"].isna(), np.nan, -rows["expert"] + rows["kl"] / 10)
    cell = cells(study(rows, made_metrics(3, {"truth": np.arange(12.0)}))).loc[("truth", "logit_drop")]
    assert cell["mean_diff"] > 0
    assert cell["share_positive"] > 0.9
    assert cell["n"] == 100  # 120 tokens, 20 of them without a next one


def test_the_noise_floor_is_the_quantile_of_the_identity_rows() -> None:
    noise = made_noise(1)
    noise.loc[0, "kl"], noise.loc[1, "js"] = np.inf, np.nan
    table = cells(study(made_effects(5), made_metrics(3, VALUES), noise))
    for outcome, column in {"delta_loss": "delta_loss", "abs_delta_loss": "delta_loss", "kl": "kl", "js": "js"}.items():
        values = noise[column].abs()
        expected = np.quantile(values[np.isfinite(values)], 0.999)
        assert (table.xs(outcome, level="outcome")["noise_floor"] == expected).all()
    assert table.xs("gap_norm", level="outcome")["noise_floor"].isna().all()  # of an identity 0 by construction
    assert table.loc[("reap", "gap_norm"), "notes"].endswith("noise_floor: not measured")
    identity = table.loc["identity"]
    assert identity.loc["delta_loss", "mean_diff"] == pytest.approx(noise["delta_loss"].abs().mean())
    assert identity.loc[["kl", "js", "tv"], "n"].tolist() == [59, 59, 60]
    assert identity.loc["kl", "dropped_nonfinite"] == 1
    large = made_noise(1) * 1e9
    quiet = cells(study(made_effects(5), made_metrics(3, VALUES), large)).loc[("reap", "delta_loss")]
    assert quiet["verdict"] == "below noise floor"


def test_correlations_are_scipys_token_by_token() -> None:
    rows = made_effects(6).drop(index=[30])  # one token is not measured whole
    rows.loc[50, "kl"] = np.inf
    found = pd.DataFrame([row for one in study(rows, made_metrics(3, VALUES)) for row in one.correlations]).set_index(
        ["metric", "outcome"]
    )
    for metric in ("utilization", "contribution_norm"):
        line = found.loc[(metric, "kl")]
        rho, tau, hits, chance, constant = [], [], [], [], 0
        for _, token in rows.assign(score=score_of(rows, metric)).groupby(TOKEN):
            if len(token) < 4 or not np.isfinite(token["kl"]).all():
                continue
            best, top = token["kl"] == token["kl"].max(), token["score"] == token["score"].max()
            hits.append((best & top).sum() / top.sum())
            chance.append(best.mean())
            if token["score"].nunique() == 1:
                constant += 1
                continue
            rho.append(stats.spearmanr(token["score"], token["kl"]).statistic)
            tau.append(stats.kendalltau(token["score"], token["kl"]).statistic)
        assert line["spearman"] == pytest.approx(np.mean(rho))
        assert line["kendall"] == pytest.approx(np.mean(tau))
        assert line["spearman_low"] < line["spearman"] < line["spearman_high"]
        assert line["top1_hit_rate"] == pytest.approx(np.mean(hits))
        assert line["top1_chance"] == pytest.approx(np.mean(chance))
        assert (line["tokens"], line["tokens_left_out"], line["spearman_constant"]) == (118, 2, constant)
    assert found.loc[("contribution_norm", "kl"), "spearman"] > 0.5
    assert found.loc[("utilization", "delta_loss"), "tokens_left_out"] == 1  # no next token: nothing to leave out


def test_tokens_with_an_expert_that_has_no_score_are_counted() -> None:
    values = np.arange(12.0)
    values[[3, 4, 5, 6, 7, 8, 9, 10]] = np.nan  # never used in the calibration text
    rows = made_effects(7)
    table = cells(study(rows, made_metrics(3, {"reap": values})))
    scored = rows.assign(scored=rows["expert"].map(dict(enumerate(~np.isnan(values))))).groupby(TOKEN)["scored"]
    some, none = int((scored.sum() < 4).sum()), int((scored.sum() == 0).sum())
    cell = table.loc[("reap", "kl")]
    assert cell["n"] + cell["ties"] + none == 120
    assert cell["ties"] == (scored.sum() == 1).sum()
    said = f"at {some} tokens an active expert has no score and was not ranked; at {none} of them none has one"
    assert said in cell["notes"]
    assert none > 0
    # The attribution of tokens without a next one: they have a kl, but nothing to rank by.
    assert "at 20 tokens an active expert has no score" in table.loc[("abs_attribution", "kl"), "notes"]
    assert "no score" not in table.loc[("attribution", "delta_loss"), "notes"]
    assert "no score" not in table.loc[("random_token", "kl"), "notes"]


def all_equal(rows: pd.DataFrame, value: Any) -> pd.DataFrame:
    return rows.assign(**dict.fromkeys(("kl", "js", "tv", "gap_norm"), value), delta_loss=value, delta_logit=value)


ODD = {
    "no differences": (all_equal(made_effects(8), 0.25), VALUES["reap"], "all 120 differences are 0"),
    "one document": (made_effects(8, tokens=30, per_document=30), VALUES["reap"], "one document only"),
    "one pair": (made_effects(8, tokens=1), VALUES["reap"], "n too small for a standard deviation: 1 pair"),
    "one active expert": (made_effects(8, active=1), VALUES["reap"], "no pairs; at 120 tokens all active experts tied"),
    "ties everywhere": (made_effects(8), np.ones(12), "no pairs; at 120 tokens all active experts tied"),
    "no values": (made_effects(8), np.full(12, np.nan), "no pairs"),
    "no finite effects": (all_equal(made_effects(8), np.nan), VALUES["reap"], "no pairs"),
    "infinite effects": (all_equal(made_effects(8), np.inf), VALUES["reap"], "no pairs"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_data_give_a_reason(name: str) -> None:
    rows, values, reason = ODD[name]
    question = replace(QUESTION, contrasts=True)
    found = study(rows, made_metrics(3, {"reap": values}), question=question)
    tables = importance_tables(found, question)
    cell = tables["cells"].set_index(["metric", "outcome"]).loc[("reap", "kl")]
    assert cell["verdict"] == "not estimable"
    assert reason in cell["reason"]
    if np.isnan(cell["cohen_d"]):
        assert np.isnan(cell["p_permutation"])
        assert "p_permutation: not computed" in cell["notes"]
    for _, row in tables["cells"].iterrows():  # whatever the outcome and whoever ranks
        assert row["verdict"] != "not estimable" or row["reason"]
        if np.isnan(row["cohen_d"]):
            assert row["verdict"] == "not estimable"
    for _, row in tables["correlations"].iterrows():
        assert row["reason"] or not np.isnan(row[["spearman_low", "kendall_low"]].astype(float)).any(), row["metric"]
    assert (tables["controls"]["rankings"].eq(0) == tables["controls"]["rejection_rate"].isna()).all()
    assert tables["correlations"]["spearman"].dtype == tables["controls"]["rejection_rate"].dtype == np.float64
    pooled = tables["pooled"].set_index(["metric", "outcome"]).loc[("reap", "kl")]
    assert pooled["notes"]


def test_effects_that_differ_by_the_same_amount_have_no_p_permutation() -> None:
    """A spread that is rounding alone is none: otherwise d, and what it is compared with, would be 1e15."""
    rows = made_effects(9, active=2, experts=2)
    rows["kl"] = np.where(rows["expert"] == 1, 0.3, 0.1) + (rows["sequence"] + rows["position"]) * 0.1
    cell = cells(study(rows, made_metrics(3, {"reap": np.arange(2.0)}))).loc[("reap", "kl")]
    assert "differences are equal" in cell["reason"]
    assert cell["mean_diff"] == pytest.approx(0.2)
    assert np.isnan(cell["p_permutation"])


def test_without_identity_rows_it_is_said_that_there_is_no_floor() -> None:
    table = cells(study(made_effects(10), made_metrics(3, VALUES), made_noise(0)[:0]))
    assert "identity" not in table.index
    assert table["noise_floor"].isna().all()
    assert table["notes"].str.contains("noise_floor: not measured").all()


def test_without_metrics_there_are_the_controls() -> None:
    names = set(cells(study(made_effects(11), NOTHING)).index.get_level_values("metric"))
    assert names == {*PREDICTED, "random_token", "random_ranking", "identity"}


def test_what_cannot_be_studied_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"'ean' has no values at layer 3; known there are reap, utilization"):
        study(made_effects(12), made_metrics(3, VALUES), question=replace(QUESTION, metrics=("reap", "ean")))
    with pytest.raises(ValueError, match=r"'reap' has no values at layer 3; known there are none"):
        study(made_effects(12), made_metrics(4, VALUES), question=replace(QUESTION, metrics=("reap",)))
    with pytest.raises(ValueError, match=r"layer 3 has no effects of single experts"):
        study(made_effects(12)[:0], made_metrics(3, VALUES))
