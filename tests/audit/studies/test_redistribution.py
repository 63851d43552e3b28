"""Redistribution tables against plain loops over hand-made effects, and against effects of a model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from audit.effects import EFFECTS
from audit.studies.redistribution import (
    NO_SHARED,
    NO_VALUE,
    NOT_MEASURED,
    depth_profile,
    redistribution_layers,
    weight_and_gap,
)


def effects(layers: int = 3, documents: int = 12, experts: int = 6, seed: int = 0, shared: bool = True) -> pd.DataFrame:
    """Random effects of ``zero``: the gap grows with depth and with the routing weight."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer, document, position in itertools.product(range(layers), range(documents), range(5)):
        for slot, expert in enumerate(rng.permutation(experts)[:2]):
            weight = rng.random() * (1 + expert)
            gap, remainder, beside = (rng.normal(size=4) for _ in range(3))
            gap *= weight * (1 + layer)
            whole = remainder + beside
            rows.append(
                {
                    "document": document,
                    "position": position,
                    "layer": layer,
                    "unit": "expert",
                    "expert": expert,
                    "slot": slot,
                    "intervention": "zero",
                    "scope": "token",
                    "routing_weight": weight,
                    "gap_norm": np.linalg.norm(gap),
                    "remainder_norm": np.linalg.norm(remainder),
                    "gap_cosine": gap @ remainder / np.linalg.norm(gap) / np.linalg.norm(remainder),
                    "remainder_norm_shared": np.linalg.norm(whole) if shared else np.nan,
                    "gap_cosine_shared": gap @ whole / np.linalg.norm(gap) / np.linalg.norm(whole)
                    if shared
                    else np.nan,
                }
            )
    return pd.DataFrame(rows)


def as_table(frame: pd.DataFrame) -> pa.Table:
    """The public schema, as an engine or a run's files give it."""
    columns = [
        pa.array(frame[f.name], from_pandas=True).cast(f.type) if f.name in frame else pa.nulls(len(frame), f.type)
        for f in EFFECTS
    ]
    return pa.Table.from_arrays(columns, schema=EFFECTS)


def test_means_and_medians_are_those_of_a_plain_loop() -> None:
    frame = effects()
    found = redistribution_layers(frame, draws=200).set_index(["layer", "quantity"])
    for layer in range(3):
        rows = frame[frame["layer"] == layer]
        for suffix in ("", "_shared"):
            compensation = []
            for _, row in rows.iterrows():
                along = row[f"remainder_norm{suffix}"] * max(row[f"gap_cosine{suffix}"], 0.0)
                compensation.append(along / row["gap_norm"])
            row = found.loc[(layer, f"relative_compensation{suffix}")]
            assert row["mean"] == pytest.approx(np.mean(compensation))
            assert row["median"] == pytest.approx(np.median(compensation))
            cosine = found.loc[(layer, f"gap_cosine{suffix}"), "mean"]
            assert cosine == pytest.approx(rows[f"gap_cosine{suffix}"].mean())
        assert found.loc[(layer, "gap_norm"), "mean"] == pytest.approx(rows["gap_norm"].mean())
    assert (found["n"] == 120).all()
    assert (found["documents"] == 12).all()
    assert (found["low"] < found["mean"]).all()
    assert (found["mean"] < found["high"]).all()
    assert (found["reason"] == "").all()


def test_arrow_tables_give_the_same_and_other_rows_do_not_count() -> None:
    frame = effects()
    others = [frame.assign(gap_norm=1e6, **{column: word}) for column, word in OTHERS]
    inactive = frame.assign(gap_norm=1e6, slot=np.nan)
    mixed = pd.concat([frame, *others, inactive], ignore_index=True).sample(frac=1.0, random_state=1)
    ours, plain = (redistribution_layers(t, draws=50) for t in (as_table(mixed), frame))
    pd.testing.assert_frame_equal(ours, plain, check_dtype=False, rtol=1e-5)
    assert plain["mean"].max() < 1e3
    ours, plain = (weight_and_gap(t) for t in (as_table(mixed), frame))
    pd.testing.assert_frame_equal(ours, plain, check_dtype=False, rtol=1e-5)


OTHERS = [("unit", "set"), ("unit", "identity"), ("intervention", "mean"), ("scope", "sequence")]


def test_the_interval_resamples_documents() -> None:
    frame = effects(layers=1, documents=40)
    level = np.random.default_rng(3).normal(size=40) * 5 + 20
    frame["gap_norm"] = level[frame["document"]]  # one value per document: tokens add nothing
    row = redistribution_layers(frame, draws=4000).iloc[0]
    exact = stats.bootstrap((level,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(1))
    width = exact.confidence_interval.high - exact.confidence_interval.low
    assert abs(row["low"] - exact.confidence_interval.low) < 0.06 * width
    assert abs(row["high"] - exact.confidence_interval.high) < 0.06 * width
    one = redistribution_layers(effects(documents=1), draws=50)
    assert one["low"].isna().all()
    assert (one["reason"] != "").all()


def test_zero_vectors_are_counted_and_missing_ones_explained() -> None:
    frame = effects(layers=1)
    frame.loc[:9, ["remainder_norm", "gap_cosine"]] = [0.0, np.nan]  # nothing remains: nothing compensates
    frame.loc[10:14, ["gap_norm", "gap_cosine"]] = [0.0, np.nan]  # nothing went
    found = redistribution_layers(frame, draws=50).set_index("quantity")
    assert found["undefined"].to_dict() == {
        "gap_norm": 0,
        "gap_cosine": 15,
        "relative_compensation": 5,
        "gap_cosine_shared": 0,
        "relative_compensation_shared": 5,
    }
    assert found.loc["relative_compensation", "n"] == len(frame) - 5
    without = redistribution_layers(effects(layers=1, shared=False), draws=50).set_index("quantity")
    assert without["reason"].to_dict() == dict.fromkeys(found.index, "") | {
        "gap_cosine_shared": NO_SHARED,
        "relative_compensation_shared": NO_SHARED,
    }
    columns = [c for c in frame if c.startswith(("remainder", "gap_cosine"))]
    unasked = redistribution_layers(frame.assign(**dict.fromkeys(columns, np.nan)), draws=50).set_index("quantity")
    assert unasked.loc["gap_norm", "reason"] == ""
    assert (unasked["reason"].drop("gap_norm") == NOT_MEASURED).all()
    alone = frame.assign(remainder_norm=0.0, gap_cosine=np.nan)  # one active expert per token
    assert redistribution_layers(alone, draws=50).set_index("quantity").loc["gap_cosine", "reason"] == NO_VALUE
    with pytest.raises(ValueError, match="no rows of zero on single experts in scope 'sequence'"):
        redistribution_layers(frame, scope="sequence")


@pytest.mark.parametrize("layers", [4, 7, 9])
def test_the_depth_profile_is_scipys(layers: int) -> None:
    table = redistribution_layers(effects(layers=layers, documents=2, seed=layers), draws=20)
    found = depth_profile(table).set_index("statistic")
    gaps = table[table["quantity"] == "gap_norm"]
    for name in ("mean", "median"):
        exact = stats.spearmanr(gaps["layer"], gaps[name])
        assert found.loc[name, "rho"] == pytest.approx(exact.statistic)
        p = exact.pvalue
        if layers < 8:
            p = stats.permutation_test(
                (gaps[name].to_numpy(),),
                lambda y: stats.spearmanr(np.arange(layers), y).statistic,
                permutation_type="pairings",
                n_resamples=math.factorial(layers),
                vectorized=False,
            ).pvalue
        assert found.loc[name, "p"] == pytest.approx(p)
        assert found.loc[name, "n"] == layers
    assert found.loc["mean", "rho"] > 0.7


def test_the_weight_of_experts_goes_with_their_gap() -> None:
    frame = effects(experts=9)
    found = weight_and_gap(frame).set_index("layer")
    for layer, rows in frame.groupby("layer"):
        weight = [rows[rows["expert"] == e]["routing_weight"].mean() for e in range(9)]
        gap = [rows[rows["expert"] == e]["gap_norm"].mean() for e in range(9)]
        exact = stats.spearmanr(weight, gap)
        assert tuple(found.loc[layer, ["n", "rho", "p"]]) == pytest.approx((9, exact.statistic, exact.pvalue))
        assert found.loc[layer, "rho"] > 0.5


def test_what_cannot_be_ranked_is_said() -> None:
    two = weight_and_gap(effects(layers=1, experts=2))
    assert two.loc[0, "reason"] == "2 experts; a rank correlation needs at least 3"
    flat = weight_and_gap(effects(layers=1).assign(gap_norm=1.0))
    assert flat.loc[0, "reason"] == "all experts have the same value"
    assert depth_profile(redistribution_layers(effects(layers=2), draws=20))["rho"].isna().all()
