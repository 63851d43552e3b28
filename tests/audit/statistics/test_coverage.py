"""Intervals and tests where the truth is known: they hold it as often as they say, and reject it no more often."""

from __future__ import annotations

import math

import numpy as np
import pytest

from audit.statistics import cluster_intervals, pigeonhole_interval
from benchmarks.coverage import INDEPENDENT, NULLS, PROMISED, Scenario, coverage, false_positives

NAMES = {"ids": lambda scenario: scenario.name}


def standard_error(rate: float, repetitions: int) -> float:
    return math.sqrt(rate * (1 - rate) / repetitions)


def check(scenario: Scenario, repetitions: int) -> None:
    """Within 93 to 97 %, widened by 4 Monte-Carlo standard errors."""
    reached = coverage(scenario, repetitions=repetitions, draws=1000, seed=1)
    error = 4 * standard_error(0.95, repetitions)
    assert 0.93 - error < reached.boot_d < 0.97 + error
    assert 0.93 - error < reached.boot_superiority < 0.97 + error
    if scenario.icc == 0 and math.isinf(scenario.freedom):
        assert 0.95 - error < reached.exact_d < 0.95 + error  # exact: nominal
    if scenario.icc > 0:
        assert reached.exact_d < 0.9  # what the bootstrap by document is for


@pytest.mark.parametrize("scenario", [INDEPENDENT[1], PROMISED[1], PROMISED[3]], **NAMES)
def test_intervals_hold_the_truth(scenario: Scenario) -> None:
    check(scenario, repetitions=400)


@pytest.mark.full
@pytest.mark.parametrize("scenario", [*INDEPENDENT, *PROMISED], **NAMES)
def test_intervals_hold_the_truth_in_the_whole_grid(scenario: Scenario) -> None:
    check(scenario, repetitions=10_000)


def check_null(scenario: Scenario, families: int) -> None:
    """At most nominal, within 4 Monte-Carlo standard errors."""
    cells, alpha = 20, 0.05
    rate = false_positives(scenario, cells=cells, families=families, alpha=alpha, seed=2)
    cell_error, family_error = standard_error(alpha, cells * families), standard_error(alpha, families)
    assert rate.cluster_t <= alpha + 4 * cell_error
    if scenario.icc > 0:
        assert rate.paired_t > 2 * alpha  # tokens of one document taken as independent
        return
    one_sided = alpha / cells / 2
    assert rate.dual <= one_sided + 4 * standard_error(one_sided, cells * families)
    assert rate.family_bonferroni <= rate.family_holm <= alpha + 4 * family_error
    assert rate.paired_t <= alpha + 4 * cell_error


@pytest.mark.parametrize("scenario", [NULLS[0], NULLS[2], NULLS[3]], **NAMES)
def test_the_null_is_rejected_at_most_as_often_as_said(scenario: Scenario) -> None:
    check_null(scenario, families=60)


@pytest.mark.full
@pytest.mark.parametrize("scenario", NULLS, **NAMES)
def test_the_null_is_rejected_at_most_as_often_as_said_in_the_whole_grid(scenario: Scenario) -> None:
    check_null(scenario, families=1000)


def test_only_the_two_way_interval_covers_an_arbitrary_ranking() -> None:
    """Experts differ, and the ranking is arbitrary: over experts the mean difference is 0, over these it is not."""
    generator = np.random.default_rng(3)
    experts, documents, repetitions = 16, 60, 150
    held = np.zeros(2)
    for seed in range(repetitions):
        effect = generator.normal(size=experts)
        pair = np.array([np.sort(generator.choice(experts, 2, replace=False)) for _ in range(5 * documents)])
        low, high = pair.T
        document = np.repeat(np.arange(documents), 5)
        diff = effect[high] - effect[low] + generator.normal(size=len(document))
        one_way = cluster_intervals(diff, document, levels=[0.95], draws=400, seed=seed)["d"][0.95]
        two_way = pigeonhole_interval(diff, document, high, low, level=0.95, draws=400, seed=seed)
        held += one_way.low <= 0 <= one_way.high, two_way.low <= 0 <= two_way.high
    one_way_share, two_way_share = held / repetitions
    assert one_way_share < 0.5
    assert two_way_share > 0.95 - 4 * standard_error(0.95, repetitions)
