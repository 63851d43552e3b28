"""Our tables beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS

from audit.published.compare import (
    agreement,
    side_by_side,
    side_by_side_control,
    side_by_side_gap_norm,
    side_by_side_progressive,
)
from audit.published.figures import published_cells, published_progressive

OLMOE, QWEN, DEEPSEEK = "OLMoE-1B-7B-0924", "Qwen1.5-MoE-A2.7B", "DeepSeek-V2-Lite"
Cell = Callable[..., pd.DataFrame]


def one(table: pd.DataFrame, **key: object) -> dict[str, object]:
    row = table[np.all([table[name] == value for name, value in key.items()], axis=0)]
    (found,) = row.to_dict("records")
    return found


def test_difference_and_interval_by_hand(cell: Cell) -> None:
    table = side_by_side(cell(), OLMOE)
    assert len(table) == 20
    row = one(table, layer=0, metric="utilization")
    theirs = -0.071 * math.sqrt(199 / 200)  # ddof 0 brought to ddof 1
    half = stats.norm.ppf(0.975) * math.sqrt(1 / 200 + theirs**2 / 400 + 1 / 300 + 0.1**2 / 600)
    assert row["published_d"] == -0.071
    assert (row["n"], row["cohen_d"], row["verdict"]) == (300, 0.1, "undecided")
    assert row["difference"] == pytest.approx(0.1 - theirs, abs=1e-12)
    assert row["difference_low"] == pytest.approx(0.1 - theirs - half, abs=1e-9)
    assert row["difference_high"] == pytest.approx(0.1 - theirs + half, abs=1e-9)
    assert row["agrees"] is True
    assert one(side_by_side(cell(cohen_d=0.4), OLMOE), layer=0, metric="utilization")["agrees"] is False


def test_qwen_is_not_rescaled(cell: Cell) -> None:
    row = one(side_by_side(cell(), QWEN), layer=0, metric="utilization")
    assert row["difference"] == pytest.approx(0.1 + 0.131, abs=1e-12)


def test_the_published_cells_agree_with_themselves(cell: Cell) -> None:
    theirs = published_cells(DEEPSEEK)
    columns = ["layer", "metric", "n", "cohen_d", "d_low", "d_high", "p_t", "p_wilcoxon"]
    ours = pd.concat([cell(**row) for row in theirs[columns].to_dict("records")], ignore_index=True)
    table = side_by_side(ours, DEEPSEEK)
    assert table["agrees"].tolist() == [True] * 20
    assert table["difference"].abs().max() < 0.001  # ddof alone
    assert agreement(table).startswith("20 of 20 compared rows agree within the 95 % interval of the difference")
    assert agreement(table).endswith("(1 would differ by chance)")


def test_only_the_comparable_cells_are_read(cell: Cell) -> None:
    others = [{"outcome": "kl"}, {"intervention": "mean"}, {"scope": "token"}, {"label": "extended"}, {"layer": 3}]
    cells = pd.concat([cell(cohen_d=5.0, **other) for other in others] + [cell()], ignore_index=True)
    table = side_by_side(cells, OLMOE)
    assert table["cohen_d"].dropna().tolist() == [0.1]
    assert one(side_by_side(cells, OLMOE, scope="token"), layer=0, metric="utilization")["cohen_d"] == 5.0


def test_released_code_is_told_from_the_definition(cell: Cell) -> None:
    code = cell(label="published_code", metric="released_utilization", cohen_d=-0.07)
    cells = pd.concat([cell(), code], ignore_index=True)
    assert one(side_by_side(cells, OLMOE), layer=0, metric="utilization")["cohen_d"] == 0.1
    released = side_by_side(cells, OLMOE, label="published_code")
    assert one(released, layer=0, metric="utilization")["cohen_d"] == -0.07


def test_what_cannot_be_compared_says_why(cell: Cell) -> None:
    cells = pd.concat([cell(cohen_d=float("nan"), n=0), cell(layer=4)], ignore_index=True)
    table = side_by_side(cells, OLMOE)
    estimable = one(table, layer=0, metric="utilization")
    assert (estimable["agrees"], estimable["reason"]) == (None, "our d is not estimable")
    absent = one(table, layer=15, metric="activation_std")
    assert (absent["agrees"], absent["reason"]) == (None, "not in our cell table")
    assert (table["agrees"].isna() == (table["reason"] != "")).all()
    assert agreement(table).endswith("; 19 could not be compared")


def test_the_control_is_compared_by_layer(cell: Cell) -> None:
    cells = pd.concat(
        [cell(label="control", metric=metric, layer=15, cohen_d=0.2) for metric in ("routing_weight", "attribution")],
        ignore_index=True,
    )
    (row,) = side_by_side_control(cells, OLMOE).to_dict("records")
    assert (row["layer"], row["published_d"], row["cohen_d"]) == (15, 0.231, 0.2)
    assert row["difference"] == pytest.approx(0.2 - 0.231, abs=1e-12)
    assert math.isnan(row["published_p_wilcoxon"])
    assert "metric" not in row


def test_mistakes_are_told_in_a_sentence(cell: Cell) -> None:
    with pytest.raises(ValueError, match=r"^model: 'olmoe' was not published"):
        side_by_side(cell(), "olmoe")
    with pytest.raises(ValueError, match=r"column 'verdict' is missing"):
        side_by_side(cell().drop(columns="verdict"), OLMOE)
    with pytest.raises(ValueError, match=r"is there twice"):
        side_by_side(pd.concat([cell(), cell()]), OLMOE)
    with pytest.raises(ValueError, match=r"holds models a folder, another; give the cells of one audit"):
        side_by_side(pd.concat([cell(), cell(model="another", layer=4)]), OLMOE)


def progressive_effects(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = 120
    document = np.repeat(np.arange(30), 4)
    loss = 0.4 + rng.normal(0, 0.5, 30)[document] + rng.normal(0, 0.5, rows)
    return pd.DataFrame(
        {
            "document": document,
            "layer": 15,
            "intervention": "zero",
            "target": "highest",
            "parameter": 7.0,
            "scope": "sequence",
            "delta_loss": loss,
        }
    )


def test_progressive_interval_is_the_cluster_robust_one() -> None:
    effects = progressive_effects()
    effects.loc[0, "delta_loss"] = np.nan  # the last position of a text has no loss
    row = one(side_by_side_progressive(effects, OLMOE), layer=15, count=7)
    y, groups = effects["delta_loss"].to_numpy()[1:], effects["document"].to_numpy()[1:]
    fit = OLS(y, np.ones(len(y))).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    ours = float(fit.bse[0]) ** 2 * (len(y) - 1) / (len(y) - 1)  # (N - 1)/(N - k) is 1 for the mean alone
    theirs = one(published_progressive(OLMOE), layer=15, count=7)
    half = stats.norm.ppf(0.975) * math.sqrt(ours + theirs["sd_delta_loss"] ** 2 / 500)  # type: ignore[operator]
    assert (row["n"], row["documents"]) == (119, 30)
    assert row["mean"] == pytest.approx(y.mean())
    assert row["difference"] == pytest.approx(y.mean() - 0.431124)
    assert row["difference_high"] == pytest.approx(row["difference"] + half, rel=1e-9)  # type: ignore[operator]
    assert row["agrees"] is True


def test_progressive_reads_nothing_else_and_says_what_is_missing() -> None:
    effects = progressive_effects()
    other = effects.assign(delta_loss=9.0)
    mixed = pd.concat(
        [effects, other.assign(target="lowest"), other.assign(intervention="mean"), other.assign(scope="token")]
    )
    table = side_by_side_progressive(mixed, OLMOE)
    assert len(table) == 42
    pd.testing.assert_frame_equal(table, side_by_side_progressive(effects, OLMOE))
    missing = one(table, layer=0, count=3)
    assert (missing["n"], missing["agrees"]) == (0, None)
    said = "0 documents with this removal (zero, highest, scope sequence); two are needed for an interval"
    assert missing["reason"] == said
    single = side_by_side_progressive(effects[effects["document"] == 3], OLMOE)
    assert one(single, layer=15, count=7)["reason"] == said.replace("0", "1", 1)
    assert side_by_side_progressive(effects, DEEPSEEK).empty


def test_gap_norm_averages_experts_then_layers() -> None:
    effects = pd.DataFrame(
        {
            "layer": [0, 0, 0, 6, 12, 12],
            "unit": ["expert"] * 5 + ["identity"],
            "expert": [1, 1, 2, 5, 5, None],
            "intervention": "zero",
            "gap_norm": [1.0, 3.0, 6.0, 5.0, 7.0, 0.0],
        }
    )
    table = side_by_side_gap_norm(effects, QWEN)
    assert table["layer"].tolist() == [0, 6, 12, 18, 23]
    assert table["gap_norm"].tolist()[:3] == [4.0, 5.0, 7.0]  # (mean of 1 and 3, then with 6): experts weigh the same
    assert table["experts"].tolist() == [2, 1, 1, 0, 0]
    assert table["ratio"][0] == pytest.approx(4 / 0.0114)
    assert table["agrees"].isna().all()
    assert table["reason"].tolist()[3] == "no effect of zero on one expert at this layer"
    expected = stats.spearmanr([4, 5, 7], [0.0114, 0.1218, 0.0905]).statistic
    assert table.attrs["profile_rho"] == pytest.approx(expected)
