from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from audit.effects import EFFECTS
from audit.studies import summary


def effect_table(frame: pd.DataFrame) -> pa.Table:
    """A table of the public schema with the given columns, null elsewhere."""
    columns = [
        pa.array(frame[f.name], from_pandas=True).cast(f.type) if f.name in frame else pa.nulls(len(frame), f.type)
        for f in EFFECTS
    ]
    return pa.Table.from_arrays(columns, schema=EFFECTS)


def random_frame(rows: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    loss = (random.normal(size=rows) * 10.0 ** random.integers(-9, 3, rows)).astype(np.float32)
    loss[random.random(rows) < 0.1] = np.nan  # no next token
    kl = (10.0 ** random.normal(-3, 3, rows)).astype(np.float32)
    return pd.DataFrame(
        {
            "layer": random.integers(0, 3, rows),
            "expert": random.integers(0, 4, rows),
            "unit": "expert",
            "intervention": random.choice(["zero", "scale"], rows),
            "target": "each",
            "scope": "token",
            "delta_loss": loss,
            "kl": kl,
            "js": kl / np.float32(4),
            "tv": np.minimum(kl, np.float32(1)),
            "top1_flip": random.random(rows) < 0.3,
            "gap_norm": kl,
        }
    ).assign(parameter=lambda f: np.where(f.intervention == "scale", np.float32(0.8), np.nan))


def no_floor() -> pa.Table:
    return summary.noise_floor([summary.noise_values(effect_table(random_frame(0)))], [])


def test_means_agree_with_a_plain_loop() -> None:
    frame = random_frame(500)
    experts = summary.expert_summary(summary.merge([summary.partial_sums(effect_table(frame), no_floor())])).to_pandas()
    assert experts["n"].sum() == 500
    for row in experts.itertuples():
        same = (frame.layer == row.layer) & (frame.expert == row.expert) & (frame.intervention == row.intervention)
        mine = frame[same]
        loss = [float(x) for x in mine.delta_loss if not math.isnan(x)]
        assert row.n == len(mine)
        assert row.n_delta_loss == len(loss)
        # fsum is correctly rounded; so is the mean of an exact sum, up to the division's own rounding of one more bit
        assert row.mean_kl == pytest.approx(math.fsum(map(float, mine.kl)) / len(mine), rel=2e-16)
        assert row.mean_delta_loss == pytest.approx(math.fsum(loss) / len(loss), rel=1e-15)
        assert row.mean_abs_delta_loss == pytest.approx(math.fsum(map(abs, loss)) / len(loss), rel=2e-16)
        assert row.mean_top1_flip == pytest.approx(mine.top1_flip.mean())


def test_sums_that_cancel_lose_nothing() -> None:
    values = np.array([1e30, 1.0, -1e30, 1e-30], np.float32)
    frame = random_frame(4).assign(layer=0, expert=0, intervention="zero", parameter=np.nan, delta_loss=values)
    merged = summary.merge([summary.partial_sums(effect_table(frame), no_floor())])
    mean = summary.expert_summary(merged).to_pandas().mean_delta_loss[0]
    assert mean == float(sum(map(Fraction, values.tolist())) / 4)
    assert mean == 0.25


def test_any_cut_and_any_order_give_the_same_bits() -> None:
    frame = random_frame(700, seed=1)
    floor = summary.noise_floor([summary.noise_values(effect_table(frame.assign(unit="identity")))], [])
    whole = summary.merge([summary.partial_sums(effect_table(frame), floor)])
    shuffled = frame.sample(frac=1, random_state=0)
    cuts = [shuffled[i : i + 7] for i in range(0, 700, 7)]
    parts = summary.merge(summary.partial_sums(effect_table(cut), floor) for cut in reversed(cuts))
    assert summary.expert_summary(whole).equals(summary.expert_summary(parts))
    assert summary.layer_summary(whole).equals(summary.layer_summary(parts))


def test_nothing_is_pooled_over_unit_intervention_parameter_or_scope() -> None:
    base = random_frame(1).assign(layer=0, expert=0, intervention="scale", parameter=np.float32(0.5), kl=np.float32(1))
    other = [
        base,
        base.assign(intervention="zero", parameter=np.nan, kl=np.float32(2)),
        base.assign(parameter=np.float32(0.8), kl=np.float32(3)),
        base.assign(scope="sequence", kl=np.float32(4)),
        base.assign(unit="shared", expert=pd.array([None], "Int16"), kl=np.float32(5)),
        base.assign(unit="set", expert=pd.array([None], "Int16"), kl=np.float32(6)),
    ]
    merged = summary.merge(summary.partial_sums(effect_table(frame), no_floor()) for frame in other)
    layers = summary.layer_summary(merged).to_pandas()
    assert sorted(layers.mean_kl) == [1, 2, 3, 4, 5, 6]
    assert sorted(layers.experts) == [0, 0, 1, 1, 1, 1]
    assert sorted(summary.expert_summary(merged).to_pandas().mean_kl) == [1, 2, 3, 4]


def test_the_noise_floor_is_that_of_identity_rows_and_flags_what_lies_below() -> None:
    identity = random_frame(1000, seed=2).assign(unit="identity", layer=1, kl=np.arange(1000, dtype=np.float32))
    rows = random_frame(4, seed=3).assign(layer=[1, 1, 1, 2], expert=0, intervention="zero", parameter=np.nan)
    rows = rows.assign(kl=np.array([998.0, 5000.0, 3.0, 0.0], np.float32))
    effects = effect_table(pd.concat([identity, rows]))
    changes = [{1: (600, 3)}, {"1": [400, 2]}]  # as an engine reports it, and as it comes back from a manifest
    floor = summary.noise_floor([summary.noise_values(effects)], changes)
    line = floor.to_pandas().query("outcome == 'kl'").iloc[0]
    assert (line.layer, line["rows"], line.maximum) == (1, 1000, 999.0)
    assert line.quantile_999 == pytest.approx(998.001)  # 0.999 of the way through 0..999
    assert line.routing_changed == 0.005
    experts = summary.expert_summary(summary.merge([summary.partial_sums(effects, floor)])).to_pandas()
    assert experts.n.tolist() == [3, 1]  # identity rows are no effects
    assert experts.share_below_noise_kl[0] == pytest.approx(2 / 3)
    assert experts.below_noise_kl.tolist() == [True, None]  # layer 2 has no floor


def test_repeats_say_how_far_an_effect_is_from_itself_in_any_cut() -> None:
    frame = random_frame(900, seed=4).assign(layer=lambda f: f.layer + 1)
    random = np.random.default_rng(5)
    frame["repeated"] = random.random(900) < 0.5
    for name in summary.COMPARED:
        frame[f"repeat_{name}"] = (frame[name] + np.float32(1e-3) * random.normal(size=900)).astype(np.float32)
        frame.loc[~frame.repeated, f"repeat_{name}"] = np.nan
    lost = frame.index[frame.repeated][::10]  # routed otherwise: no such effect
    frame.loc[lost, [f"repeat_{name}" for name in summary.COMPARED]] = np.nan
    frame = pd.concat([frame, random_frame(60, seed=6).assign(unit="identity", repeated=False, layer=1)])
    floor = summary.noise_floor([summary.noise_values(effect_table(frame))], [])
    cuts = [frame.sample(frac=1, random_state=0)[i : i + 11] for i in range(0, 960, 11)]
    assert floor.equals(summary.noise_floor([summary.noise_values(effect_table(cut)) for cut in cuts], []))
    for line in floor.to_pandas().itertuples():
        mine = frame[frame.repeated & (frame.layer == line.layer)]
        apart = [
            abs(float(again) - float(once))
            for once, again in zip(mine[line.outcome], mine[f"repeat_{line.outcome}"], strict=True)
            if not math.isnan(again) and not math.isnan(once)
        ]
        assert line.repeats == len(apart) > 90
        assert line.repeats_rerouted == mine.repeat_kl.isna().sum() > 10
        assert line.repeat_maximum == max(apart)
        assert line.repeat_quantile_999 == pytest.approx(np.quantile(apart, 0.999), rel=1e-12)
        assert line.rows == (60 if line.layer == 1 and line.outcome != "delta_loss" else line.rows)
        assert (line.layer == 1) == (line.rows > 0)  # repeats are no identity rows


def test_a_repeat_is_no_effect() -> None:
    """Repeats stand in columns of their effects: means, counts and what lies below the floor do not know of them."""
    frame = random_frame(200, seed=7)
    again = frame.assign(repeated=True, **{f"repeat_{name}": np.float32(9) for name in summary.COMPARED})
    floor = summary.noise_floor([summary.noise_values(effect_table(frame.assign(unit="identity")))], [])
    tables = [summary.merge([summary.partial_sums(effect_table(f), floor)]) for f in (frame, again)]
    assert summary.expert_summary(tables[0]).equals(summary.expert_summary(tables[1]))


def test_values_that_are_not_finite_are_counted_and_in_no_mean() -> None:
    frame = random_frame(3).assign(layer=0, expert=0, intervention="zero", parameter=np.nan, delta_loss=np.float32(1))
    frame["kl"] = np.array([1.0, np.inf, 3.0], np.float32)
    table = effect_table(frame)
    row = summary.expert_summary(summary.merge([summary.partial_sums(table, no_floor())])).to_pylist()[0]
    assert (row["nonfinite"], row["mean_kl"], row["mean_delta_loss"]) == (1, 2.0, 1.0)
