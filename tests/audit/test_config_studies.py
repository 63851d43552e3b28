"""The section ``studies`` of a specification: defaults, what it takes, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from audit.config import AuditConfig, ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
OUTCOMES = ["delta_loss", "abs_delta_loss", "kl", "js", "tv", "top1_flip", "logit_drop", "gap_norm"]


def load(folder: Path, specification: dict[str, Any], *overrides: str) -> AuditConfig:
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return AuditConfig.load(folder / "audit.yaml", overrides)


def studies(text: str) -> dict[str, Any]:
    return {"studies": yaml.safe_load(text)}


def test_without_a_word_no_study_is_made(tmp_path: Path) -> None:
    found = load(tmp_path, {}).studies
    assert (found.importance, found.progressive, found.redistribution, found.redundancy) == (None, None, False, None)


def test_an_empty_section_is_a_study_with_its_defaults(tmp_path: Path) -> None:
    """As documented: every outcome, delta_loss and kl confirmatory, 999 rankings, 199 prunings."""
    found = load(tmp_path, studies("{importance: {}, progressive: {}, redundancy: {}}")).resolved()["studies"]
    assert found["importance"] == {
        "metrics": "all",
        "outcomes": OUTCOMES,
        "confirmatory": ["delta_loss", "kl"],
        "alpha": 0.05,
        "margin": 0.1,
        "superiority_margin": 0.05,
        "random_rankings": 999,
        "bootstrap_draws": 10_000,
        "released_code": False,
        "contrasts": False,
    }
    assert found["progressive"] == {"positions": 500, "layers": None, "metrics": "all", "draws": 20, "cliff": 0.1}
    assert found["redundancy"] == {
        "shares": [0.125, 0.25, 0.5],
        "metrics": "all",
        "draws": 199,
        "documents": 40,
        "margin": 0.1,
        "bootstrap_draws": 2_000,
    }


def test_what_is_resolved_is_read_again_as_the_same(tmp_path: Path) -> None:
    config = AuditConfig.load(CONFIGS / "importance.yaml")
    assert AuditConfig.parse(config.resolved(), CONFIGS) == config
    assert config.studies.progressive is not None
    assert config.studies.progressive.metrics == ("utilization", "mean_routing_weight", "activation_norm", "reap")


def test_one_key_of_a_study_can_be_set_by_itself(tmp_path: Path) -> None:
    config = load(tmp_path, {}, "studies.importance.margin=0.2", "studies.redundancy.shares=[0.5]")
    assert config.studies.importance is not None
    assert (config.studies.importance.margin, config.studies.importance.alpha) == (0.2, 0.05)
    assert config.studies.redundancy is not None
    assert config.studies.redundancy.shares == (0.5,)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        (
            studies("{importance: {outcomes: [kl, tv], confirmatory: [kl, delta_loss]}}"),
            r"studies\.importance\.confirmatory: 'delta_loss' is not among the outcomes; add it there or leave it out$",
        ),
        (studies("{importance: {outcomes: [kl, loss]}}"), r"studies\.importance\.outcomes: .*'loss'.*delta_loss, abs_"),
        (
            studies("{importance: {outcomes: []}}"),
            r"studies\.importance\.outcomes: \[\] cannot be used; it takes a list",
        ),
        (
            studies("{importance: {metrics: []}}"),
            r"studies\.importance\.metrics: \[\] cannot be used; it takes all, or",
        ),
        (studies("{importance: {alpha: 0.5}}"), r"studies\.importance\.alpha: 0\.5 cannot be used; .* below 0\.5"),
        (
            studies("{importance: {alpha: 0}}"),
            r"studies\.importance\.alpha: 0 cannot be used; it takes a number above 0",
        ),
        (studies("{importance: {margin: -1}}"), r"studies\.importance\.margin: -1 cannot be used; .* above 0"),
        (studies("{importance: {random_rankings: 0}}"), r"studies\.importance\.random_rankings: 0 .* at least 1; 999"),
        (studies("{importance: {bootstrap_draws: 99}}"), r"studies\.importance\.bootstrap_draws: 99 .* at least 100$"),
        (
            studies("{importance: {metric: reap}}"),
            r"studies\.importance\.metric: unknown key .* \(did you mean metrics\?\)",
        ),
        (
            studies("{importance: yes}"),
            r"studies\.importance: True cannot be used; it takes a section with the keys metr",
        ),
        (studies("{progressive: {positions: 0}}"), r"studies\.progressive\.positions: 0 .*null for all audited"),
        (studies("{progressive: {layers: []}}"), r"studies\.progressive\.layers: \[\] cannot be used"),
        (studies("{progressive: {layers: [-1]}}"), r"studies\.progressive\.layers: \[-1\] cannot be used"),
        (studies("{progressive: {draws: 0}}"), r"studies\.progressive\.draws: 0 cannot be used"),
        (studies("{progressive: {cliff: 0}}"), r"studies\.progressive\.cliff: 0 .* a number of nats above 0"),
        (studies("{redistribution: {}}"), r"studies\.redistribution: \{\} cannot be used; it takes true or false"),
        (
            studies("{redundancy: {shares: [0.5, 1]}}"),
            r"studies\.redundancy\.shares: \[0\.5, 1\] .* above 0 and below 1",
        ),
        (studies("{redundancy: {shares: []}}"), r"studies\.redundancy\.shares: \[\] cannot be used"),
        (studies("{redundancy: {documents: 0}}"), r"studies\.redundancy\.documents: 0 cannot be used"),
        (studies("{redundancies: {}}"), r"studies\.redundancies: unknown key .* \(did you mean redundancy\?\)"),
        (
            {"interventions": [{"target": "all"}], **studies("{importance: {}}")},
            r"studies\.importance: it compares the experts of a token one by one, .* add \{kind: zero\} to",
        ),
        (
            {"interventions": [{"target": {"highest": 1}}], **studies("{redistribution: true}")},
            r"studies\.redistribution: it compares the experts of a token one by one, .* add \{kind: zero\}",
        ),
        (
            {"attribution": True, "scope": "sequence"},
            r"attribution: True has no meaning for scope sequence; it estimates effects at one token$",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, specification: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}") as raised:
        load(tmp_path, specification)
    assert "\n" not in str(raised.value)
