"""A layer's effects as arrays: every value where it belongs, whatever the order of rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_effects import made_effects

from audit.studies.active_experts import OUTCOMES, ActiveExperts, active_experts


def arrays(active: ActiveExperts) -> list[np.ndarray]:
    named = [active.document_N, active.sequence_N, active.position_N, active.expert_NK]
    return [*named, *active.predictors.values(), *active.outcomes.values()]


def test_every_value_stands_at_its_token_and_expert_and_the_rest_is_nan() -> None:
    rows = made_effects(0, tokens=40).drop(index=[3, 17, 18, 19, 101])  # tokens with 3 and with 1 expert
    active = active_experts(rows)
    found = 0
    for n in range(len(active)):
        token = rows[(rows["sequence"] == active.sequence_N[n]) & (rows["position"] == active.position_N[n])]
        assert active.document_N[n] == token["document"].iloc[0]
        count = len(token)
        found += count
        assert active.expert_NK[n].tolist() == [*sorted(token["expert"]), *[-1] * (4 - count)]
        token = token.sort_values("expert")
        for arrays_of, names in (
            (active.predictors, ["routing_weight", "contribution_norm", "attribution"]),
            (active.outcomes, ["delta_loss", "kl", "js", "tv", "top1_flip", "gap_norm"]),
        ):
            for name in names:
                np.testing.assert_array_equal(arrays_of[name][n, :count], token[name].to_numpy(np.float64))
                assert np.isnan(arrays_of[name][n, count:]).all()
    assert found == len(rows)
    assert np.lexsort((active.position_N, active.sequence_N)).tolist() == list(range(len(active)))


def test_the_order_of_rows_does_not_matter() -> None:
    rows = made_effects(1).drop(index=[5, 50])
    for seed in range(3):
        shuffled = rows.sample(frac=1, random_state=seed)
        for ours, theirs in zip(arrays(active_experts(rows)), arrays(active_experts(shuffled)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_logits_are_turned_and_absolute_values_taken() -> None:
    rows = made_effects(2, tokens=6, active=2).sort_values(["sequence", "position", "expert"])
    active = active_experts(rows)
    for name, expected in (("logit_drop", -rows["delta_logit"]), ("abs_delta_loss", rows["delta_loss"].abs())):
        np.testing.assert_array_equal(active.outcomes[name].ravel(), expected)
    np.testing.assert_array_equal(active.predictors["abs_attribution"].ravel(), rows["attribution"].abs())
    # The logit of the true token falls where the loss rises: both are positive for an expert that matters.
    correlated = np.corrcoef(rows["delta_loss"].dropna(), -rows["delta_logit"].dropna())[0, 1]
    assert correlated > 0.9


def test_draws_are_averaged_and_none_drops_out_of_the_mean_unseen() -> None:
    single = made_effects(3, tokens=12, active=2)
    draws = [single.assign(draw=draw, delta_loss=single["delta_loss"] * (draw - 1)) for draw in range(3)]
    rows = pd.concat(draws, ignore_index=True)
    first = (rows["sequence"] == 0) & (rows["position"] == 1) & (rows["draw"] == 2)
    rows.loc[first, "kl"] = np.nan
    active = active_experts(rows.sample(frac=1, random_state=0))
    assert active.expert_NK.shape == (12, 2)
    ordered = single.sort_values(["sequence", "position", "expert"])
    np.testing.assert_allclose(active.outcomes["delta_loss"].ravel(), 0 * ordered["delta_loss"], atol=1e-15)
    # |effect| is taken before the mean: draws of opposite sign are no absence of an effect.
    expected = ordered["delta_loss"].abs().to_numpy() * (1 + 0 + 1) / 3
    np.testing.assert_allclose(active.outcomes["abs_delta_loss"].ravel(), expected)
    assert np.isnan(active.outcomes["kl"][0]).all()
    np.testing.assert_allclose(active.outcomes["kl"][1:].ravel(), ordered["kl"][2:])


def test_a_loss_is_undefined_without_a_next_token_but_a_value_that_is_not_finite_is_kept() -> None:
    rows = made_effects(4, tokens=18, active=2)  # three documents of six tokens
    token = rows["sequence"] * 6 + rows["position"] - 1
    rows.loc[(token == 1), "delta_loss"] = np.inf
    rows.loc[rows.index[token == 2][:1], "delta_loss"] = np.nan  # of one expert
    rows.loc[token == 3, ["delta_loss", "kl", "js", "tv", "delta_logit"]] = np.nan  # a forward gone wrong
    active = active_experts(rows)
    last = np.arange(18) % 6 == 5
    for outcome in OUTCOMES:
        expected = ~last if outcome in ("delta_loss", "abs_delta_loss", "logit_drop") else np.ones(18, bool)
        assert active.defined_N(outcome).tolist() == expected.tolist(), outcome


def test_scores_are_a_metric_by_the_experts_number() -> None:
    active = active_experts(made_effects(5, tokens=5, active=3).drop(index=[0, 4]))
    value_E = np.arange(12.0) ** 2
    value_E[7] = np.nan
    for expert, score in zip(active.expert_NK.ravel(), active.scores(value_E).ravel(), strict=True):
        assert score == pytest.approx(expert**2 if expert not in (-1, 7) else np.nan, nan_ok=True)


def test_one_expert_and_no_rows() -> None:
    assert active_experts(made_effects(6, tokens=4, active=1)).expert_NK.shape == (4, 1)
    empty = active_experts(made_effects(6)[:0])
    assert len(empty) == 0
    assert empty.expert_NK.shape == (0, 0)
