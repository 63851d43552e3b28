"""The public contrast table: what is read, what is refused and how, and the same cells whatever the order of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from audit.statistics.cells import Settings
from audit.studies.contrasts import (
    COLUMNS,
    DEFAULTS,
    ContrastError,
    cells_of,
    pooled_of,
    read_contrasts,
    write_cells,
)

SETTINGS = Settings(bootstrap_draws=200)
HEADER = "model,layer,metric,outcome,document,position,expert_high,expert_low,effect_high,effect_low"
GOOD = "m,0,reap,kl,{document},{position},3,1,0.5,0.25"


def rows(count: int = 4) -> list[str]:
    return [GOOD.format(document=i // 2, position=i) for i in range(count)]


def csv(folder: Path, lines: list[str], header: str = HEADER) -> Path:
    path = folder / "contrasts.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def frame(seed: int = 0, n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = []
    for layer in (0, 2):
        for metric in ("utilization", "reap"):
            parts.append(
                pd.DataFrame(
                    {
                        "model": "m",
                        "layer": layer,
                        "metric": metric,
                        "outcome": "kl",
                        "document": np.arange(n) // 2,
                        "position": np.arange(n) % 2 + 1,
                        "expert_high": pd.array(np.where(np.arange(n) % 9, rng.integers(0, 8, n), -1), "Int64"),
                        "expert_low": rng.integers(0, 8, n),
                        "effect_high": rng.normal(0.5, 1, n),
                        "effect_low": rng.normal(0, 1, n),
                    }
                )
            )
    made = pd.concat(parts, ignore_index=True)
    made["expert_high"] = made["expert_high"].mask(made["expert_high"] == -1)
    return made


def test_csv_and_parquet_are_read_alike_and_optional_columns_filled(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "a.csv", index=False)
    frame().to_parquet(tmp_path / "a.parquet")
    read = read_contrasts(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(read, read_contrasts(tmp_path / "a.parquet"), check_exact=True)
    assert tuple(read.columns) == COLUMNS
    assert {name: set(read[name]) for name in DEFAULTS} == {name: {value} for name, value in DEFAULTS.items()}
    assert (read["expert_high"] == -1).sum() == 4 * 7  # nulls: several tied
    assert read["effect_high"].sum() == pytest.approx(frame()["effect_high"].sum())


def test_a_cell_of_the_table_holds_its_pairs(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "a.csv", index=False)
    cells = cells_of(read_contrasts(tmp_path / "a.csv"), SETTINGS)
    assert cells[["layer", "metric"]].to_numpy().tolist() == [
        [layer, metric] for layer in (0, 2) for metric in ("reap", "utilization")
    ]
    for _, cell in cells.iterrows():
        part = frame().query("layer == @cell.layer and metric == @cell.metric")
        assert (cell["n"], cell["documents"]) == (60, 30)
        assert cell["experts_high"] == part["expert_high"].dropna().nunique()
        assert cell["p_t"] == pytest.approx(stats.ttest_rel(part["effect_high"], part["effect_low"]).pvalue)
        assert cell["family_size"] == 4
        assert "p_permutation: not computed; noise_floor: not measured" in cell["notes"]


def test_pooled_lines_align_layers_by_token(tmp_path: Path) -> None:
    frame().sample(frac=1, random_state=1).to_csv(tmp_path / "a.csv", index=False)
    line = pooled_of(read_contrasts(tmp_path / "a.csv"), SETTINGS).set_index("metric").loc["reap"]
    wide = frame().query("metric == 'reap'")
    wide = wide.assign(diff=wide["effect_high"] - wide["effect_low"])
    wide = wide.pivot(index=["document", "position"], columns="layer", values="diff")
    assert line["mean_d"] == pytest.approx((wide / wide.std()).mean(axis=1).mean())
    assert (line["layers"], line["positions"], line["positions_incomplete"]) == (2, 60, 0)


def test_the_same_contrasts_in_any_order_and_format_give_the_same_bytes(tmp_path: Path) -> None:
    shuffled = frame().sample(frac=1, random_state=3)
    shuffled[shuffled.columns[::-1]].to_csv(tmp_path / "a.csv", index=False)
    frame().to_parquet(tmp_path / "b.parquet", row_group_size=17)
    for name in ("a.csv", "b.parquet"):
        write_cells(cells_of(read_contrasts(tmp_path / name), SETTINGS), tmp_path / name[0])
    for name in ("cells.csv", "cells.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cells.csv", "cells.parquet"]  # nothing left
    back = pd.read_parquet(tmp_path / "a" / "cells.parquet")
    assert back["n"].tolist() == [60] * 4
    assert pd.read_csv(tmp_path / "a" / "cells.csv")["p_t"].tolist() == back["p_t"].tolist()


def test_effects_that_are_not_finite_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = [f"m,0,reap,kl,{i // 2},{i},3,1,{i * i},0.25" for i in range(8)]
    lines[1], lines[4], lines[5] = (
        lines[1].replace(",1,0.25", ",nan,0.25"),
        lines[4].replace(",16,", ",,"),
        lines[5].replace(",0.25", ",-inf"),
    )
    cell = cells_of(read_contrasts(csv(tmp_path, lines)), SETTINGS).iloc[0]
    assert (cell["n"], cell["dropped_nonfinite"]) == (5, 3)


def test_documents_may_have_names(tmp_path: Path) -> None:
    lines = [GOOD.format(document=name, position=i) for i, name in enumerate(["wiki/7", "7", "07", "7"])]
    read = read_contrasts(csv(tmp_path, lines))
    assert sorted(read["document"]) == ["07", "7", "7", "wiki/7"]
    assert cells_of(read, SETTINGS)["documents"].tolist() == [3]


@pytest.mark.parametrize(
    ("row", "field", "value", "sentence"),
    [
        (16, "effect_high", "abc", "column effect_high, row 17: 'abc' is not a number; it takes a number"),
        (0, "effect_low", "1,5", "row 1 has 11 fields; the header names 10 columns"),
        (2, "layer", "-1", "column layer, row 3: '-1' cannot be used; it takes a whole number of at least 0"),
        (2, "layer", "1.5", "column layer, row 3: '1.5' cannot be used"),
        (2, "layer", "", "column layer, row 3: is empty; it takes a whole number of at least 0"),
        (1, "position", "x", "column position, row 2: 'x' cannot be used"),
        (
            4,
            "expert_low",
            "-1",
            "column expert_low, row 5: '-1' cannot be used; it takes a whole number of at least 0, or",
        ),
        (3, "document", "", "column document, row 4: is empty; it takes the number or name of a document"),
        (5, "metric", "", "column metric, row 6: is empty; it takes a text"),
        (5, "outcome", "  ", "column outcome, row 6: '  ' cannot be used; it takes a text"),
        (9, "position", "8", "column position, row 10: 8 of document 4, sequence 0, stands in row 9 already"),
        (9, "position", "99999999999999999999", "column position, row 10: '99999999999999999999' cannot be used"),
    ],
)
def test_a_bad_value_is_refused_by_column_and_row(
    tmp_path: Path, row: int, field: str, value: str, sentence: str
) -> None:
    lines = [line.split(",") for line in rows(20)]
    lines[row][HEADER.split(",").index(field)] = value
    with pytest.raises(ContrastError) as caught:
        read_contrasts(csv(tmp_path, [",".join(line) for line in lines]))
    message = str(caught.value)
    assert message.startswith("contrasts.csv: ")
    assert sentence in message
    assert "\n" not in message


def test_bad_tables_are_refused_in_a_sentence(tmp_path: Path) -> None:
    def refusal(lines: list[str], header: str = HEADER) -> str:
        with pytest.raises(ContrastError) as caught:
            read_contrasts(csv(tmp_path, lines, header))
        return str(caught.value)

    assert "holds no rows" in refusal([])
    assert "column effect_low is missing" in refusal(["m,0,reap,kl,0,0,3,1,0.5"], HEADER.removesuffix(",effect_low"))
    typo = refusal(["m,0,reap,kl,0,0,3,1,0.5,0.2,zero"], HEADER + ",interventon")
    assert "unknown column 'interventon' (did you mean intervention?)" in typo
    assert "column layer occurs twice" in refusal(["m,0,reap,kl,0,0,3,1,0.5,0.2,0"], HEADER + ",layer")
    assert "row 3 has 3 fields" in refusal([*rows(2), "m,0,reap", *rows(4)[2:]])
    two = refusal([f"{line},{label}" for line, label in zip(rows(3), "aab", strict=True)], HEADER + ",label")
    assert "column label, row 3: 'b', but other rows of this cell say 'a'" in two

    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(HEADER.encode() + b"\nm\xff\xfe,0,reap,kl,0,0,3,1,0.5,0.2\n")
    (tmp_path / "no.parquet").write_text("model,layer")
    for name, words in [
        ("empty.csv", "cannot be read as CSV"),
        ("binary.csv", "cannot be read as CSV"),
        ("no.parquet", "cannot be read as Parquet"),
        ("absent.csv", "cannot be read as CSV"),
        ("absent.parquet", "cannot be read as Parquet"),
        ("table.xlsx", ".xlsx cannot be read; name a .csv or .parquet file"),
        ("table", "name a .csv or .parquet file"),
    ]:
        with pytest.raises(ContrastError, match=words):
            read_contrasts(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("metric", pa.array([1, 2]), "column metric: holds int64; it takes text"),
        ("layer", pa.array([0.0, 0.5]), "column layer, row 2: 0.5 cannot be used"),
        ("layer", pa.array([0.0, float("nan")]), "column layer, row 2: nan cannot be used"),
        ("layer", pa.array([True, False]), "column layer: holds bool; it takes whole numbers"),
        ("expert_high", pa.array([1, -2]), "column expert_high, row 2: -2 cannot be used"),
        ("effect_high", pa.array([True, False]), "column effect_high: holds bool; it takes numbers"),
        ("document", pa.array([True, False]), "column document: holds bool; it takes numbers or names"),
        ("document", pa.array([1, None]), "column document, row 2: is empty"),
    ],
)
def test_parquet_columns_of_a_wrong_type_are_refused(
    tmp_path: Path, column: str, values: pa.Array, sentence: str
) -> None:
    table = pa.Table.from_pandas(frame()[:2], preserve_index=False)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), tmp_path / "a.parquet")
    with pytest.raises(ContrastError, match=r"a\.parquet: ") as caught:
        read_contrasts(tmp_path / "a.parquet")
    assert sentence in str(caught.value)


def test_dictionaries_floats_for_whole_numbers_and_small_types_are_read(tmp_path: Path) -> None:
    made = frame().assign(sequence=3)
    made["metric"] = made["metric"].astype("category")
    made["expert_high"] = made["expert_high"].astype("float64")  # what pandas makes of integers with nulls
    made["effect_high"] = made["effect_high"].astype("float32")
    made["document"] = made["document"].astype("int32")
    made.to_parquet(tmp_path / "a.parquet")
    read = read_contrasts(tmp_path / "a.parquet")
    assert (read["expert_high"] == -1).sum() == 28
    assert set(read["sequence"]) == {3}
    assert set(read["metric"]) == {"reap", "utilization"}
    assert read["effect_high"].dtype == np.float64
