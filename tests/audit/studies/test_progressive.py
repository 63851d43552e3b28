"""Progressive ablation: the removals that are asked for, and the curves, cliffs and areas made of their effects."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from families import ready, texts

from audit.engine import Engine
from audit.interventions import Intervention, Target
from audit.observations import metrics
from audit.statistics.bootstrap import mean_interval
from audit.studies.observed import oriented
from audit.studies.progressive import ProgressiveSettings, area_table, progressive_interventions, progressive_table

FAST = ProgressiveSettings(bootstrap_draws=300, seed=3)
ORDERS = ("highest", "lowest", "random", "ranked:reap")
COUNTS, DRAWS = (1, 2, 3), 4
# nats per expert removed, by order: reap here is a little better than chance, routing weight much
SLOPES = {"highest": 0.09, "lowest": 0.005, "random": 0.03, "ranked:reap": 0.04}


def removals(seed: int = 0, documents: int = 12, tokens: int = 7, layers: tuple[int, ...] = (0, 5)) -> pd.DataFrame:
    """An effect table in which an order's mean delta_loss grows by its slope with every expert; with other rows."""
    random = np.random.default_rng(seed)
    rows = []
    for layer, document, position, order, count in product(layers, range(documents), range(tokens), ORDERS, COUNTS):
        for draw in range(DRAWS if order == "random" else 1):
            loss = SLOPES[order] * count + 0.02 * random.standard_t(4)
            rows.append(
                {
                    "document": 10 * document,
                    "sequence": document,
                    "position": position,
                    "scope": "token",
                    "layer": layer,
                    "intervention": "zero",
                    "target": order,
                    "parameter": np.float32(count),
                    "draw": draw if order == "random" else np.nan,
                    "delta_loss": np.nan if position == tokens - 1 else np.float32(loss),
                    "kl": np.float32(abs(loss) / 2),
                }
            )
    table = pd.DataFrame(rows)
    others = [
        table.head(20).assign(target="each", delta_loss=1e6),
        table.head(20).assign(intervention="mean", delta_loss=1e6),
        table.head(20).assign(target=None, delta_loss=1e6),
    ]
    mixed = pd.concat([table, *others]).sample(frac=1, random_state=seed)  # index labels repeat, order is arbitrary
    return mixed.astype({"target": "category", "intervention": "category", "scope": "category"})


def plain(
    effects: pd.DataFrame, layer: int, order: str, count: int, outcome: str
) -> dict[tuple[int, int], list[float]]:
    """Values by (document, position), by a plain loop."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in effects.to_dict("records"):
        named = (row["intervention"], row["target"], row["layer"], row["parameter"])
        if named == ("zero", order, layer, count) and not np.isnan(row[outcome]):
            found.setdefault((row["document"], row["position"]), []).append(float(row[outcome]))
    return found


def test_removals_of_every_count_in_every_order() -> None:
    asked = progressive_interventions(4, ("reap", "routing_gini"), 20)
    assert len(asked) == len(set(asked)) == 5 * 3
    assert {i.kind for i in asked} == {"zero"}
    for name in ("highest", "lowest", "random", "ranked:reap", "ranked:routing_gini"):
        assert [i.target.count for i in asked if i.target.name == name] == [1, 2, 3]
    assert {i.draws for i in asked if i.target.selection == "random"} == {20}
    assert progressive_interventions(2, (), 1)[0] == Intervention("zero", Target("highest", count=1))
    for intervention in asked:
        intervention.check(4, 8, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, (), 20), "top_k: 1 active expert leaves nothing between"),
        ((4, (), 0), "draws: 0 random orders are not possible"),
        ((4, ("reap", "reap"), 5), "names a metric twice"),
    ],
)
def test_removals_that_cannot_be_asked_for(arguments: tuple[int, tuple[str, ...], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        progressive_interventions(*arguments)


def test_curves_agree_with_a_plain_loop() -> None:
    effects = removals()
    table = progressive_table(effects, FAST)
    assert len(table) == 2 * len(ORDERS) * len(COUNTS)
    for row in table.itertuples():
        values = plain(effects, row.layer, row.order, row.count, "delta_loss")
        kl = plain(effects, row.layer, row.order, row.count, "kl")
        means = [sum(one) / len(one) for one in values.values()]
        single = [x for one in values.values() for x in one]
        assert (row.tokens, row.n, row.documents) == (12 * 7, 12 * 6, 12)
        assert (row.draws, row.nonfinite, row.reason) == (DRAWS if row.order == "random" else 1, 0, "")
        assert row.mean == pytest.approx(sum(means) / len(means), rel=1e-12)
        assert row.median == pytest.approx(np.median(single), rel=1e-12)
        assert row.p95 == pytest.approx(np.quantile(single, 0.95), rel=1e-12)
        assert row.share_positive == pytest.approx(sum(x > 0 for x in single) / len(single))
        assert row.mean_kl == pytest.approx(np.mean([np.mean(one) for one in kl.values()]), rel=1e-12)
        documents = np.array([document for document, _ in values])
        expected = mean_interval(np.array(means), documents, level=0.95, draws=300, seed=3)
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
        if row.order != "random":
            assert np.isnan(row.sd_draws)
            continue
        by_draw = [np.mean([one[d] for one in by_draw_of(effects, row.layer, row.count)]) for d in range(DRAWS)]
        assert row.sd_draws == pytest.approx(np.std(by_draw, ddof=1), rel=1e-9)


def by_draw_of(effects: pd.DataFrame, layer: int, count: int) -> list[dict[int, float]]:
    """Per token {draw: delta_loss} of random removals."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for row in effects.to_dict("records"):
        named = (row["intervention"], row["target"], row["layer"], row["parameter"])
        if named == ("zero", "random", layer, count) and not np.isnan(row["delta_loss"]):
            found.setdefault((row["document"], row["position"]), {})[int(row["draw"])] = float(row["delta_loss"])
    return list(found.values())


def test_the_order_of_the_rows_does_not_matter() -> None:
    effects = removals()
    pd.testing.assert_frame_equal(
        progressive_table(effects, FAST), progressive_table(effects.sample(frac=1, random_state=9), FAST)
    )


def test_cliffs_are_where_the_slopes_put_them() -> None:
    table = progressive_table(removals(documents=40), FAST)
    cliffs = table.groupby(["layer", "order"], observed=True)[["cliff", "cliff_reason"]].first()
    for layer in (0, 5):
        assert cliffs.loc[(layer, "highest"), "cliff"] == 2  # .09, .18
        assert cliffs.loc[(layer, "ranked:reap"), "cliff"] == 3  # .04, .08, .12
        assert pd.isna(cliffs.loc[(layer, "random"), "cliff"])  # .03, .06, .09
        told = cliffs.loc[(layer, "random"), "cliff_reason"]
        assert told.startswith("no mean above 0.1 nat; the largest is 0.0")
        assert told.endswith("with 3 removed")
    assert (table["cliff"].isna() == (table["cliff_reason"] != "")).all()
    later = progressive_table(removals(documents=40), ProgressiveSettings(cliff=0.2, bootstrap_draws=300))
    assert later[later["order"] == "highest"]["cliff"].tolist() == [3] * 6


def test_areas_against_random_agree_with_a_plain_loop() -> None:
    effects = removals()
    table = area_table(effects, FAST)
    assert table["order"].tolist() == ["highest", "lowest", "ranked:reap"] * 4
    for row in table.itertuples():
        own = [plain(effects, row.layer, row.order, count, row.outcome) for count in COUNTS]
        random = [plain(effects, row.layer, "random", count, row.outcome) for count in COUNTS]
        tokens = sorted(own[0])
        areas = [np.mean([c[token][0] for c in own]) for token in tokens]
        chance = [np.mean([np.mean(c[token]) for c in random]) for token in tokens]
        assert (row.counts, row.n, row.left_out, row.reason) == (3, len(tokens), 0, "")
        assert row.area == pytest.approx(np.mean(areas), rel=1e-9)
        assert row.area_random == pytest.approx(np.mean(chance), rel=1e-9)
        assert row.difference == pytest.approx(np.mean(areas) - np.mean(chance), rel=1e-9)
        differences = np.array(areas) - np.array(chance)
        expected = mean_interval(differences, np.array([d for d, _ in tokens]), level=0.95, draws=300, seed=3)
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_areas_find_the_planted_differences() -> None:
    """The mean over counts 1 to 3 is twice the slope; intervals hold the truth and tell orders from chance."""
    table = area_table(removals(documents=60, layers=(0,)), FAST).query("outcome == 'delta_loss'").set_index("order")
    for order in ("highest", "lowest", "ranked:reap"):
        truth = 2 * (SLOPES[order] - SLOPES["random"])
        row = table.loc[order]
        assert row["low"] < truth < row["high"]
        assert (row["low"] > 0) if truth > 0 else (row["high"] < 0)


# ---- odd data ----


def one_cell(effects: pd.DataFrame, order: str, count: int = 1) -> dict[str, object]:
    table = progressive_table(effects, FAST)
    (row,) = table[(table["order"] == order) & (table["count"] == count)].to_dict("records")
    return row


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    effects = removals(layers=(0,)).reset_index(drop=True)
    at = effects.index[(effects["target"] == "highest") & (effects["parameter"] == 1) & effects["delta_loss"].notna()]
    at = at[effects.loc[at, "intervention"] == "zero"]
    effects.loc[at[0], "delta_loss"] = np.inf
    effects.loc[at[1], ["delta_loss", "kl"]] = np.nan
    row = one_cell(effects, "highest")
    assert (row["tokens"], row["n"], row["nonfinite"]) == (12 * 7, 12 * 6 - 2, 2)
    left = effects.loc[at[2:], "delta_loss"].astype(float)
    assert row["mean"] == pytest.approx(left.mean(), rel=1e-12)
    areas = area_table(effects, FAST).set_index(["order", "outcome"])
    assert areas.loc[("highest", "delta_loss"), ["n", "left_out"]].tolist() == [12 * 6 - 2, 2]
    assert areas.loc[("highest", "kl"), ["n", "left_out"]].tolist() == [12 * 7 - 1, 1]
    assert areas.loc[("lowest", "delta_loss"), ["n", "left_out"]].tolist() == [12 * 6, 0]


def test_one_document_has_no_interval() -> None:
    effects = removals(documents=1)
    table = progressive_table(effects, FAST)
    assert table["mean"].notna().all()
    assert table["low"].isna().all()
    assert table["reason"].str.startswith("one document").all()
    assert area_table(effects, FAST)["reason"].str.startswith("one document").all()


def test_no_next_token_anywhere() -> None:
    effects = removals().assign(delta_loss=np.nan)
    table = progressive_table(effects, FAST)
    assert (table["n"] == 0).all()
    assert (table["reason"] == "no token has a finite outcome").all()
    assert (table["cliff_reason"] == "no token has a delta_loss").all()
    assert table["mean_kl"].notna().all()
    areas = area_table(effects, FAST)
    assert areas[areas["outcome"] == "delta_loss"]["reason"].tolist() == ["no token has a finite outcome"] * 6


def test_one_draw_and_no_random_order() -> None:
    effects = removals()
    once = effects[effects["draw"].isna() | (effects["draw"] == 0)]
    assert one_cell(once[once["layer"] == 0], "random")["reason"] == "one draw: no spread over draws"
    areas = area_table(effects[effects["target"] != "random"], FAST)
    assert areas["reason"].tolist() == ["no random order was measured"] * 12
    assert areas["area"].notna().all()
    few = effects[(effects["target"] != "random") | (effects["parameter"] > 2)]
    assert (area_table(few, FAST)["counts"] == 1).all()
    apart = effects[(effects["target"] == "random") == (effects["parameter"] > 2)]
    assert (area_table(apart, FAST)["reason"] == "no count was measured in both orders").all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.drop(columns=["draw", "kl"]), "the columns draw, kl are missing"),
        (lambda e: e[e["intervention"] == "mean"], "no row removes"),
        (lambda e: e.head(0), "no row removes"),
        (lambda e: pd.concat([e, e]), r"removals are there twice, such as \{'scope': 'token'"),
    ],
)
def test_tables_that_are_refused(change: object, message: str) -> None:
    for study in (progressive_table, area_table):
        with pytest.raises(ValueError, match=message):
            study(change(removals()), FAST)  # type: ignore[operator]


@pytest.mark.parametrize("options", [{"cliff": 0.0}, {"level": 1.0}, {"bootstrap_draws": 0}, {"cliff": np.nan}])
def test_settings_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"progressive\.{next(iter(options))}"):
        ProgressiveSettings(**options)  # type: ignore[arg-type]


# ---- from a model ----


def test_from_a_model_to_its_curves() -> None:
    """The first removals are those that removing experts one by one measures as well."""
    model = ready("olmoe", 0)
    engine = Engine(model, memory=2**62, seed=1)
    observed = metrics(engine.observe(texts((40, 40), 9)).observations)
    rankings = oriented(observed.assign(domain=None))
    sequences, positions = texts((9, 7, 8), 2), [np.arange(9), np.arange(7), np.arange(8)]
    asked = [*progressive_interventions(2, ("reap", "routing_gini"), 3), Intervention("zero")]
    effects = engine.measure(sequences, positions, layers=[1, 2], interventions=asked, rankings=rankings).effects
    frame = effects.to_pandas()
    table = progressive_table(frame, FAST).set_index(["layer", "order"])
    assert set(table.index.get_level_values("order")) == {
        "highest", "lowest", "random", "ranked:reap", "ranked:routing_gini",
    }  # fmt: skip
    single = frame[frame["target"] == "each"]
    token = ["sequence", "position"]
    for layer, of_layer in single.groupby("layer"):
        best = of_layer.loc[of_layer.groupby(token)["routing_weight"].idxmax()]
        assert table.loc[(layer, "highest"), "mean"] == pytest.approx(best["delta_loss"].mean(), rel=1e-5)
        for metric in ("reap", "routing_gini"):
            score = of_layer["expert"].astype(int).map(lambda e, m=metric, at=layer: rankings[m][at][e])
            first = of_layer.assign(score=score)
            first = first.loc[first.groupby(token)["score"].idxmax()]
            assert table.loc[(layer, f"ranked:{metric}"), "mean"] == pytest.approx(first["delta_loss"].mean(), rel=1e-5)
    assert table["n"].unique().tolist() == [21]
    assert table["tokens"].unique().tolist() == [24]
    assert len(area_table(frame, FAST)) == 2 * 4 * 2
