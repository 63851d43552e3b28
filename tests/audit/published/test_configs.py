"""The published configurations, and that each runs on a checkpoint of the same structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import tiny_checkpoint, tiny_model

from audit.config import AuditConfig
from audit.models import prepare
from audit.models.loading import load_model
from audit.published.figures import METRICS, MODELS, model_facts

CONFIGS = Path(__file__).parents[3] / "configs" / "published"
MAIN = dict(zip(("olmoe", "qwen1_5_moe", "deepseek_v2_lite"), MODELS, strict=True))
MOE_LAYERS = {"olmoe": range(16), "qwen1_5_moe": range(24), "deepseek_v2_lite": range(1, 27)}


@pytest.mark.parametrize("name", MAIN)
def test_the_published_settings(name: str) -> None:
    config, facts = AuditConfig.load(CONFIGS / f"{name}.yaml"), model_facts()[MAIN[name]]
    assert config.model.source == facts["hub_name"]["value"]
    assert config.model.dtype == facts["published_dtype"]["value"]
    assert list(config.layers) == facts["published_layers"]["value"]
    assert (config.seed, config.positions.sample, config.scope) == (42, 200, "sequence")
    (text,) = config.resolved()["corpus"]["sources"]
    assert (text["name"], text["config"], text["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert (text["min_characters"], text["first"], config.corpus.max_tokens) == (50, 100, 512)
    importance = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["studies"]["importance"]
    assert tuple(importance["metrics"]) == METRICS
    assert importance["outcomes"][0] == "delta_loss"
    assert (importance["alpha"], importance["released_code"]) == (0.05, True)


def test_every_published_configuration_is_read() -> None:
    names = {path.stem: AuditConfig.load(path).name for path in CONFIGS.glob("*.yaml")}
    assert set(names) == {*MAIN, "olmoe_progressive", "olmoe_redistribution", "qwen1_5_moe_redistribution"}
    assert all(name == f"published_{stem}" for stem, name in names.items())


@pytest.mark.parametrize("name", MAIN)
def test_tiny_models_are_found_as_the_real_ones_would_be(name: str) -> None:
    facts = model_facts()[MAIN[name]]
    model = prepare(tiny_model(MAIN[name]))
    experts = facts["num_experts" if "num_experts" in facts else "n_routed_experts"]["value"]
    assert model.description.moe_layers == tuple(MOE_LAYERS[name])
    assert (model.description.experts, model.description.top_k) == (experts, facts["num_experts_per_tok"]["value"])
    assert model.description.shared_experts is (name != "olmoe")
    assert model.description.engine == "sweep"


def test_tiny_checkpoints_are_read_from_disk(tmp_path: Path) -> None:
    model = load_model(str(tiny_checkpoint(MAIN["deepseek_v2_lite"], tmp_path)), device="cpu")
    assert model.description.moe_layers == tuple(range(1, 27))
    assert len(model.tokenizer("a few words")["input_ids"]) >= 3
