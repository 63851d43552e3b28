"""``moe-audit cells``: verdicts of a contrast table from anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from shapes import Call


def contrasts(rows: int = 300) -> pd.DataFrame:
    """One metric that knows (mean difference 1, sd 1) and one that does not, over 60 documents."""
    rng = np.random.default_rng(3)
    frames = []
    for metric, shift in (("reap", 1.0), ("utilization", 0.0)):
        low = rng.normal(0, 1, rows)
        frames.append(
            pd.DataFrame(
                {
                    "model": "made up",
                    "metric": metric,
                    "outcome": "kl",
                    "layer": 2,
                    "document": np.arange(rows) % 60,
                    "position": np.arange(rows) // 60 + 1,
                    "expert_high": rng.integers(0, 4, rows),
                    "expert_low": rng.integers(4, 8, rows),
                    "effect_high": low + rng.normal(shift, 1, rows),
                    "effect_low": low,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def made(tmp_path: Path, call: Call) -> Path:
    contrasts().to_csv(tmp_path / "pairs.csv", index=False)
    status, _, err = call("cells", tmp_path / "pairs.csv", "--out", tmp_path / "cells", "--draws", 300)
    assert (status, err) == (0, "")
    return tmp_path


def test_cells_of_a_csv_file(made: Path, call: Call) -> None:
    cells = pd.read_parquet(made / "cells" / "cells.parquet").set_index("metric")
    for metric, rows in contrasts().groupby("metric"):
        diff = rows["effect_high"] - rows["effect_low"]
        cell = cells.loc[metric]
        assert cell["n"] == 300
        assert cell["cohen_d"] == pytest.approx(diff.mean() / diff.std(ddof=1))
        assert cell["p_t"] == pytest.approx(stats.ttest_1samp(diff, 0).pvalue)
        assert cell["alpha_corrected"] == 0.025  # two cells of one family
        assert pd.isna(cell["p_permutation"])
    assert cells["verdict"].to_dict()["reap"] == "predicts"
    assert cells["verdict"].to_dict()["utilization"] != "predicts"
    text = pd.read_csv(made / "cells" / "cells.csv").set_index("metric")
    assert text["cohen_d"].to_dict() == pytest.approx(cells["cohen_d"].to_dict())


def test_parquet_and_shuffled_rows_give_the_same_bytes(made: Path, call: Call) -> None:
    shuffled = contrasts().sample(frac=1, random_state=1)
    shuffled.to_parquet(made / "pairs.parquet", index=False)
    shuffled[shuffled.columns[::-1]].to_csv(made / "shuffled.csv", index=False)
    for source in ("pairs.parquet", "shuffled.csv"):
        out = made / source.partition(".")[2]
        assert call("cells", made / source, "--out", out, "--draws", 300)[0] == 0
        for name in ("cells.parquet", "cells.csv"):
            assert (out / name).read_bytes() == (made / "cells" / name).read_bytes()


def test_what_is_said(made: Path, call: Call) -> None:
    _, out, _ = call("cells", made / "pairs.csv", "--out", made / "more", "--draws", 300, "--alpha", 0.2)
    assert "Verdicts by metric and outcome" in out
    assert "1 predicts" in out
    assert "2 cells were tested: reap and utilization against kl at 1 layer of made up." in out
    assert f"2 cells in {made}/more/cells.parquet and {made}/more/cells.csv" in out
    cells = pd.read_parquet(made / "more" / "cells.parquet")
    assert set(cells["alpha_corrected"]) == {0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", 2], "--alpha: 2.0"),
        (["--margin", 0], "--margin: 0.0"),
        (["--draws", 0], "--draws: 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(made: Path, call: Call, options: list[object], message: str) -> None:
    status, out, err = call("cells", made / "pairs.csv", "--out", made / "new", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"moe-audit: {message}")
    assert not (made / "new").exists()


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, call: Call) -> None:
    table = contrasts(10)
    bad = table.astype({"effect_low": object})
    bad.loc[6, "effect_low"] = "much"
    cases = {
        "missing.csv": (table.drop(columns="document"), "column document is missing"),
        "row.csv": (bad, "column effect_low, row 7: 'much' is not a number"),
        "more.csv": (table.assign(metrik="x"), "metrik"),
        "twice.csv": (pd.concat([table, table.iloc[[4]]]), "a token is in a cell once"),
        "empty.csv": (table.iloc[:0], "holds no rows"),
    }
    for name, (frame, message) in cases.items():
        frame.to_csv(tmp_path / name, index=False)
        status, out, err = call("cells", tmp_path / name, "--out", tmp_path / "new")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"moe-audit: {name}: ")
        assert message in err
    for name in ("nowhere.csv", "pairs.txt"):
        status, out, err = call("cells", tmp_path / name, "--out", tmp_path / "new")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert name in err
    assert not (tmp_path / "new").exists()
