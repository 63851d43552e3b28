"""Findings: the paragraph says what the table holds, and claims no more."""

from __future__ import annotations

from typing import Any

import pandas as pd

from audit.statistics.cells import Settings
from audit.studies.findings import Controls, findings

SETTINGS = Settings()


def cell(verdict: str, **changes: Any) -> dict[str, Any]:
    base = {"model": "m", "layer": 0, "metric": "reap", "outcome": "kl", "label": "extended", "verdict": verdict}
    base |= {"n": 400, "cohen_d": 0.3, "mde_80": 0.2, "n_to_decide": None, "p_t": 0.5}
    return base | {"equivalence_uncorrected": verdict == "practically null"} | changes


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    types = {"n_to_decide": "Int64", "equivalence_uncorrected": "boolean", "cohen_d": "float64", "mde_80": "float64"}
    return frame.astype(types)


CONTROLS = (
    cell("undecided", metric="random_token", label="control", p_t=0.03),
    cell("practically null", metric="random_token", label="control", layer=1),
    cell("predicts", metric="routing_weight", label="control"),
)


def test_the_paragraph_counts_every_verdict_of_the_tested_cells() -> None:
    text = findings(
        table(
            cell("predicts", cohen_d=0.3, layer=1),
            cell("predicts", cohen_d=0.6, layer=2, metric="ean"),
            cell("reversed", cohen_d=-0.4, layer=3, outcome="tv"),
            cell("undecided", layer=4, n_to_decide=1687, n=200, mde_80=0.28),
            cell("undecided", layer=5),
            cell("practically null", layer=6),
            cell("not estimable", layer=7, cohen_d=None, mde_80=None, equivalence_uncorrected=None),
            cell("below noise floor", layer=8),
            *CONTROLS,
        ),
        SETTINGS,
    )
    for sentence in (
        "8 cells were tested: ean and reap against kl and tv at 8 layers of m.",
        "2 of 8 predict the effect: ean in 1, reap in 1; the largest d is 0.60 (ean, kl, layer 2).",
        "1 of 8 are reversed (experts ranked high matter less): reap in 1; the largest d is -0.40 (reap, tv, layer 3).",
        "1 of 8 are practically null: an effect beyond d = ±0.1 is excluded.",
        "2 of 8 are undecided, which is no evidence of absence; about 1,700 pairs would decide 1 of them.",
        "With 200 to 400 pairs a cell sees d = 0.20 to 0.28 with a power of 80 %",
        "1 of 8 are below noise floor; the table says why.",
        "1 of 8 are not estimable; the table says why.",
        "That no metric predicts anywhere cannot be claimed: 1 of 8 cells are practically null at 0.05",
        "Negative controls (random_token) behaved: 0 of 2 cells read predicts or reversed; p_t is below 0.05 in 1, "
        "about 0.1 being expected.",
        "Positive controls (routing_weight) predict in 1 of 1 cells.",
    ):
        assert sentence in text, sentence
    assert "\n" not in text


def test_no_metric_predicts_anywhere_is_claimed_only_if_every_cell_is_practically_null() -> None:
    claim = "No metric predicts anywhere: every cell is practically null at 0.05."
    null = [cell("practically null", layer=layer) for layer in range(3)]
    weak = cell("undecided", layer=3, equivalence_uncorrected=True)  # null at .05 each, not at the family's alpha
    assert claim in findings(table(*null, weak, *CONTROLS), SETTINGS)
    for other in (
        cell("undecided", layer=3),
        cell("not estimable", layer=3, equivalence_uncorrected=None),
        cell("below noise floor", layer=3, equivalence_uncorrected=True),
        cell("predicts", layer=3, equivalence_uncorrected=True),
        cell("associated", layer=3, equivalence_uncorrected=True),
    ):
        assert claim not in findings(table(*null, other), SETTINGS), other["verdict"]


def test_controls_that_misbehave_or_are_missing_are_said() -> None:
    wrong = findings(table(cell("undecided"), cell("predicts", metric="random_token", label="control")), SETTINGS)
    assert "Negative controls (random_token) did NOT behave: 1 of 1 cells" in wrong
    assert "No positive control was run" in wrong
    none = findings(table(cell("undecided")), SETTINGS)
    assert "No negative control was run." in none
    blind = findings(table(cell("undecided"), cell("undecided", metric="mine", label="control")), SETTINGS)
    assert "mine" not in blind
    named = Controls(positive=("mine",))
    blind = findings(table(cell("undecided"), cell("undecided", metric="mine", label="control")), SETTINGS, named)
    assert "Positive controls (mine) predict in 0 of 1 cells: what these cells can find is not shown." in blind
    assert findings(table(*CONTROLS), SETTINGS).startswith("No cell was tested. Negative controls")
