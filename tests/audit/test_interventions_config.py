"""Random and ranked targets as a specification writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.config import AuditConfig, ConfigError
from audit.interventions import Intervention, Target


def load(folder: Path, text: str) -> AuditConfig:
    (folder / "audit.yaml").write_text(f"interventions: [{text}]")
    return AuditConfig.load(folder / "audit.yaml")


@pytest.mark.parametrize(
    ("text", "intervention"),
    [
        ("{target: {random: 2}}", Intervention("zero", Target("random", count=2))),
        ("{target: {random: 1}, draws: 20}", Intervention("zero", Target("random", count=1), draws=20)),
        ("{target: {ranked: 3, metric: reap}}", Intervention("zero", Target("ranked", count=3, metric="reap"))),
        ("{target: {metric: seer, ranked: 1}}", Intervention("zero", Target("ranked", count=1, metric="gate_sum"))),
        (
            "{kind: resample, draws: 2, target: {ranked: 1, metric: routing_gini}}",
            Intervention("resample", Target("ranked", count=1, metric="routing_gini"), draws=2),
        ),
    ],
)
def test_targets_that_can_be_written(tmp_path: Path, text: str, intervention: Intervention) -> None:
    config = load(tmp_path, text)
    assert config.build_interventions() == (intervention,)
    assert AuditConfig.parse(config.resolved(), tmp_path).build_interventions() == (intervention,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{target: {random: 0}}",
            r"interventions\.0\.target\.random: 0 experts cannot be removed; at least 1 is needed",
        ),
        ("{target: random}", r"interventions\.0\.target: 'random' cannot be used; it takes each, .*\{random: n\}"),
        (
            "{target: {ranked: 2}}",
            r"interventions\.0\.target: \{'ranked': 2\} cannot be used.*\{ranked: n, metric: name\}",
        ),
        ("{target: {metric: reap}}", r"interventions\.0\.target: \{'metric': 'reap'\} cannot be used"),
        ("{target: {ranked: 0, metric: reap}}", r"interventions\.0\.target\.ranked: 0 experts cannot be removed"),
        (
            "{target: {ranked: reap, metric: 2}}",
            r"interventions\.0\.target: ranked 'reap' with metric 2 cannot be used",
        ),
        (
            "{target: {ranked: 1, metric: reaper}}",
            r"interventions\.0\.target\.metric: 'reaper' is unknown; known are util",
        ),
        ("{target: {ranked: 1, metric: reap}, draws: 2}", r"interventions\.0\.draws: 2 does not fit .* 'ranked'"),
        ("{target: {random: 1}, draws: 0}", r"interventions\.0\.draws: 0 does not fit"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}") as raised:
        load(tmp_path, text)
    assert "\n" not in str(raised.value)
