"""The planted model is what it claims to be: which expert matters is known, and the engine finds it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import FIRST, LAYERS, TOP_K, Planted, planted_model

from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models import prepare

TOKEN = ["sequence", "position"]


def measured(planted: Planted) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects of every active expert, and the tokens, without the ends of the sequences."""
    engine = Engine(validate(prepare(planted.module)), memory=2**62)
    positions = [np.arange(1, len(s.token_ids) - 1) for s in planted.sequences]
    found = engine.measure(
        planted.sequences, positions, layers=range(LAYERS), interventions=[Intervention("zero")], attribution=True
    )
    effects = found.effects.to_pandas()
    return effects[effects["unit"] == "expert"], found.tokens.to_pandas()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_expert_matters_most(seed: int) -> None:
    planted = planted_model(seed, documents=8)
    effects, tokens = measured(planted)
    assert tokens["baseline_loss"].median() < 1.0  # the model knows the rule
    for layer, rows in effects.groupby("layer"):
        best = planted.experts[layer]
        kl = rows.groupby("expert")["kl"].mean()
        assert kl.idxmax() == best
        assert kl[best] > 3 * kl.drop(best).max()
        active = rows[rows.groupby(TOKEN)["expert"].transform(lambda ids, best=best: (ids == best).any())]
        expected = tokens.loc[tokens["baseline_loss"] < 1.0, TOKEN]  # what follows is no surprise
        for column, share, of in (("contribution_norm", 0.9, active), ("attribution", 0.5, active.merge(expected))):
            largest = of.loc[of.groupby(TOKEN)[column].idxmax(), "expert"] == best
            assert largest.mean() > share, (layer, column)
            median = of.groupby("expert")[column].median()
            assert median.idxmax() == best


def test_it_is_active_for_its_tokens_with_partners_that_differ() -> None:
    planted = planted_model(5, documents=8)
    effects, tokens = measured(planted)
    for layer, rows in effects.merge(tokens[[*TOKEN, "token_id"]]).groupby("layer"):
        own = rows[rows["expert"] == planted.experts[layer]]
        meant = rows["token_id"].isin(planted.routed[layer])
        reached = own["token_id"].isin(planted.routed[layer]).sum() / rows[meant].groupby(TOKEN).ngroups
        assert reached > 0.7, layer
        assert 0.3 < len(own) / rows.groupby(TOKEN).ngroups < 0.95
        assert set(own["slot"]) == set(range(TOP_K))  # its routing weight does not give it away
        partners = rows.merge(own[TOKEN])
        assert partners["expert"].nunique() >= 6


def test_texts_follow_one_rule_and_seeds_give_other_models() -> None:
    planted = planted_model(3, surprise=0.0, documents=3)
    followers: dict[int, set[int]] = {}
    for sequence in planted.sequences:
        assert sequence.token_ids.min() >= FIRST
        for token, following in zip(sequence.token_ids[:-1].tolist(), sequence.token_ids[1:].tolist(), strict=True):
            followers.setdefault(token, set()).add(following)
    assert all(len(found) == 1 for found in followers.values())
    same, other = planted_model(3, surprise=0.0, documents=3), planted_model(4, surprise=0.0, documents=3)
    assert same.experts == planted.experts
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(same.sequences, planted.sequences, strict=True))
    assert all((a == b).all() for a, b in zip(same.module.parameters(), planted.module.parameters(), strict=True))
    assert other.experts != planted.experts
