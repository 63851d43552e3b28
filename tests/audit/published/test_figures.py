"""The published figures: complete, and consistent with the statistics they claim to be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import STRUCTURE, tiny_config
from transformers import CONFIG_MAPPING

import audit.published.figures as figures
from audit.published.figures import (
    METRICS,
    MODELS,
    model_facts,
    published_cells,
    published_control,
    published_expert_metrics,
    published_gap_norm,
    published_progressive,
)

DATA = Path(figures.__file__).parent / "data"
LAYERS = {
    "OLMoE-1B-7B-0924": [0, 4, 7, 11, 15],
    "Qwen1.5-MoE-A2.7B": [0, 6, 12, 18, 23],
    "DeepSeek-V2-Lite": [1, 7, 13, 20, 26],
}


def test_sixty_cells() -> None:
    cells = published_cells()
    assert len(cells) == 60
    assert not cells.isna().any().any()
    for model in MODELS:
        own = published_cells(model)
        assert sorted(own["layer"].unique()) == LAYERS[model] == model_facts()[model]["published_layers"]["value"]
        assert own.groupby("layer")["metric"].apply(set).tolist() == [set(METRICS)] * 5


def test_p_follows_from_d_and_n() -> None:
    # t = d sqrt(n), d with ddof 1; each d is printed with three decimals.
    for cell in pd.concat([published_cells(), published_control()]).to_dict("records"):
        scale = math.sqrt(cell["n"] - 1) if cell["ddof"] == 0 else math.sqrt(cell["n"])
        near, far = ((abs(cell["cohen_d"]) + e) * scale for e in (-0.00051, 0.00051))
        p_high, p_low = (2 * stats.t.sf(t, cell["n"] - 1) for t in (max(near, 0.0), far))
        assert p_low - 5.1e-4 <= cell["p_t"] <= p_high + 5.1e-4, cell


def test_intervals_are_those_of_the_file() -> None:
    printed = pd.read_csv(DATA / "importance_cells.csv")
    cells = published_cells()
    # The file was rounded from a d with more digits than it prints.
    np.testing.assert_allclose(cells[["d_low", "d_high"]], printed[["d_low", "d_high"]], atol=0.0057)
    third = cells.iloc[2]
    half = stats.norm.ppf(0.975) * math.sqrt(1 / 200 + 0.048**2 / 400)
    assert (third["d_low"], third["d_high"]) == pytest.approx((0.048 - half, 0.048 + half), abs=1e-12)


def test_the_control_has_the_rows_that_were_published() -> None:
    control = published_control()
    assert control.groupby("model").size().to_dict() == {MODELS[0]: 1, MODELS[1]: 5, MODELS[2]: 5}
    (olmoe,) = published_control(MODELS[0]).to_dict("records")
    assert (olmoe["layer"], olmoe["cohen_d"]) == (15, 0.231)
    assert math.isnan(olmoe["p_wilcoxon"])


def test_progressive_ablation_and_its_cliff() -> None:
    table = published_progressive(MODELS[0])
    assert table.groupby("layer")["count"].apply(list).tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 6
    above = table[table["mean_delta_loss"] > 0.1].groupby("layer")["count"].min()
    assert above.to_dict() == {15: 2}  # the one cliff of the paper
    assert table[table["count"] == 7].set_index("layer")["p95_delta_loss"].round(2)[15] == 2.63
    assert published_progressive(MODELS[2]).empty


def test_gap_norms_grow_with_depth() -> None:
    olmoe = published_gap_norm(MODELS[0])
    assert olmoe["layer"].tolist() == list(range(16))
    assert olmoe["mean_gap_norm"].is_monotonic_increasing
    assert published_gap_norm(MODELS[1])["layer"].tolist() == LAYERS[MODELS[1]]
    assert published_gap_norm(MODELS[2]).empty


def test_released_expert_metrics_are_shares_of_51200_positions() -> None:
    table = published_expert_metrics(MODELS[2])
    assert table.groupby("metric").size().tolist() == [64] * 4
    share = table[table["metric"] == "utilization_rate"]["value"]
    assert share.sum() == pytest.approx(6, abs=1e-9)  # top-6
    np.testing.assert_array_equal((share * 51_200).round(6) % 1, 0)
    assert published_expert_metrics(MODELS[0]).empty


def test_a_callers_change_does_not_reach_the_figures() -> None:
    mine = published_gap_norm()
    mine["layer"] = -1
    assert published_gap_norm()["layer"].min() == 0


@pytest.mark.parametrize("read", [published_cells, published_control, published_progressive, published_gap_norm])
def test_unknown_models_are_named(read: object) -> None:
    assert callable(read)
    with pytest.raises(ValueError, match=r"^model: 'OLMoE' was not published; published are OLMoE-1B-7B-0924, Qwen"):
        read("OLMoE")


def test_every_file_has_a_source() -> None:
    said = (DATA / "SOURCE.md").read_text("utf-8")
    names = {path.name for path in DATA.iterdir()}
    assert {name for name in names if name.endswith((".csv", ".yaml"))} == {n for n in names if f"`{n}`" in said}


@pytest.mark.parametrize("model", MODELS)
def test_facts_agree_with_the_class_they_cite(model: str) -> None:
    facts = model_facts()[model]
    defaults = CONFIG_MAPPING[facts["model_type"]["value"]]()
    cited = {name: fact["value"] for name, fact in facts.items() if fact["source"] == "transformers"}
    cited.pop("model_type", None)
    assert {name: getattr(defaults, name) for name in cited} == cited
    for name, fact in facts.items():
        assert set(fact) == {"value", "source", "verified"}, name
        assert fact["verified"] is (fact["source"] != "derivative"), name


@pytest.mark.parametrize("model", MODELS)
def test_tiny_checkpoints_have_the_structure(model: str) -> None:
    facts, config = model_facts()[model], tiny_config(model)
    assert config.model_type == facts["model_type"]["value"]
    known = [name for name in STRUCTURE if name in facts]
    assert len(known) >= 4
    assert {name: getattr(config, name) for name in known} == {name: facts[name]["value"] for name in known}
