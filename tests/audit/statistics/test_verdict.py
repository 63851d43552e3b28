"""Verdicts: the first rule that holds, each boundary from both sides, and reasons in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.stats.power

from audit.statistics.verdict import Evidence, Rule, practically_null, verdict

RULE = Rule(alpha=0.05, alpha_corrected=0.0025, margin=0.1, superiority_margin=0.05)

CLEAR = Evidence(
    missing="",
    orientation=1,
    n=1000,
    d=0.3,
    exact_95=(0.24, 0.36),
    exact_corrected=(0.21, 0.39),
    cluster_95=(0.2, 0.4),
    cluster_90=(0.22, 0.38),
    superiority_90=(0.6, 0.7),
    p_t=1e-9,
    p_wilcoxon=1e-8,
    p_t_cluster=1e-6,
    p_permutation=0.001,
    median_abs_effect=1e-3,
    noise_floor=1e-6,
)
MIRRORED = replace(
    CLEAR,
    d=-0.3,
    exact_95=(-0.36, -0.24),
    exact_corrected=(-0.39, -0.21),
    cluster_95=(-0.4, -0.2),
    cluster_90=(-0.38, -0.22),
    superiority_90=(0.3, 0.4),
)
NULL = replace(
    CLEAR,
    n=4000,
    d=0.01,
    exact_95=(-0.02, 0.04),
    exact_corrected=(-0.04, 0.06),
    cluster_95=(-0.03, 0.05),
    cluster_90=(-0.02, 0.04),
    superiority_90=(0.48, 0.52),
    p_t=0.5,
    p_wilcoxon=0.4,
    p_t_cluster=0.6,
    p_permutation=0.7,
)


@pytest.mark.parametrize(
    ("evidence", "word"),
    [
        (CLEAR, "predicts"),
        (MIRRORED, "reversed"),
        (replace(CLEAR, orientation=-1), "predicts"),  # its caller turned the pairs
        (replace(CLEAR, orientation=0), "associated"),
        (replace(MIRRORED, orientation=0), "associated"),
        (NULL, "practically null"),
        (replace(NULL, orientation=0), "practically null"),
        (replace(CLEAR, missing="n too small"), "not estimable"),
        (replace(CLEAR, missing="n too small", noise_floor=1.0), "not estimable"),
        (replace(CLEAR, noise_floor=2e-3), "below noise floor"),
        (replace(NULL, noise_floor=2e-3), "below noise floor"),
        (replace(CLEAR, noise_floor=1e-3), "predicts"),  # at the floor is not below it
        (replace(CLEAR, noise_floor=None), "predicts"),
        (replace(CLEAR, p_permutation=None), "predicts"),
        # practically null comes first: a difference that is significant and too small to matter
        (replace(NULL, d=0.04, exact_95=(0.02, 0.06), p_t=1e-9, p_wilcoxon=1e-9, p_t_cluster=1e-9), "practically null"),
    ],
)
def test_the_first_rule_that_holds_gives_the_word(evidence: Evidence, word: str) -> None:
    assert verdict(evidence, RULE).word == word


@pytest.mark.parametrize(
    "change",
    [
        {"p_t": 0.0025},
        {"p_wilcoxon": 0.0025},
        {"p_t_cluster": 0.0025},
        {"p_permutation": 0.05},
        {"exact_95": (0.0, 0.6)},
        {"cluster_95": (-0.01, 0.6)},
        {"p_t": float("nan")},
    ],
)
def test_one_failing_condition_of_predicts_leaves_the_cell_undecided_and_is_named(change: dict[str, object]) -> None:
    found = verdict(replace(CLEAR, **change), RULE)  # type: ignore[arg-type]
    names = {"exact_95": "exact interval of d", "cluster_95": "that by document"}
    name = next(iter(change))
    assert found.word == "undecided"
    assert found.reason.startswith("undecided")
    assert names.get(name, name) in found.reason
    assert not any(other in found.reason for other in {"p_t ", "p_wilcoxon", "p_permutation"} - {name, f"{name} "})


@pytest.mark.parametrize(
    "change",
    [
        {"exact_corrected": (-0.101, 0.06)},
        {"cluster_90": (-0.02, 0.11)},
        {"superiority_90": (0.44, 0.52)},
        {"superiority_90": (0.48, 0.56)},  # d is blind to order under heavy tails
        {"superiority_90": (float("nan"), float("nan"))},
        {"exact_corrected": (float("nan"), float("nan"))},
    ],
)
def test_one_interval_that_leaves_its_margin_prevents_practically_null(change: dict[str, object]) -> None:
    found = verdict(replace(NULL, **change), RULE)  # type: ignore[arg-type]
    assert found.word == "undecided"


def test_margins_themselves_still_count_as_within() -> None:
    edge = replace(NULL, exact_corrected=(-0.1, 0.1), cluster_90=(-0.1, 0.1), superiority_90=(0.45, 0.55))
    assert practically_null(edge, RULE, edge.exact_corrected)
    assert not practically_null(edge, replace(RULE, margin=0.099), edge.exact_corrected)


def test_an_undecided_cell_names_the_pairs_that_would_find_its_d() -> None:
    """The n of an independent power calculation; d is beyond the margin, so being null cannot be what decides."""
    evidence = replace(
        CLEAR,
        n=200,
        d=0.2,
        exact_95=(0.06, 0.34),
        exact_corrected=(0.0, 0.4),
        cluster_95=(0.06, 0.34),
        p_t=0.005,
        p_wilcoxon=0.01,
        p_t_cluster=0.006,
    )
    power = statsmodels.stats.power.TTestPower()
    needed = float(np.ceil(power.solve_power(effect_size=0.2, alpha=0.0025, power=0.8)))
    found = verdict(evidence, RULE)
    assert found.n_to_decide == pytest.approx(needed, abs=1)
    assert f"about {round(needed, -1):.0f} pairs would decide" in found.reason

    wider = verdict(replace(evidence, cluster_95=(0.2 - 0.28, 0.2 + 0.28)), RULE)  # twice as wide as the exact one
    assert wider.n_to_decide == pytest.approx(4 * needed, abs=4)


def test_near_zero_the_pairs_that_would_decide_are_those_of_equivalence() -> None:
    """At d = 0 the exact interval is about +-z/sqrt(n): n = (z / margin)^2."""
    evidence = replace(
        NULL, n=300, d=0.0, exact_95=(-0.11, 0.11), exact_corrected=(-0.16, 0.16), cluster_95=(-0.11, 0.11)
    )
    found = verdict(evidence, RULE)
    assert found.n_to_decide == pytest.approx((2.807 / 0.1) ** 2, rel=0.02)  # z of 1 - .0025
    assert "about 790 pairs would decide" in found.reason


def test_more_pairs_do_not_decide_whether_the_ranking_is_an_arbitrary_one() -> None:
    found = verdict(replace(CLEAR, p_permutation=0.34), RULE)
    assert (found.word, found.n_to_decide) == ("undecided", None)
    assert "more pairs would not decide" in found.reason
    assert "p_permutation is 0.34: an arbitrary ranking of these experts does as well" in found.reason


def test_a_cell_with_enough_pairs_is_not_told_to_get_more() -> None:
    found = verdict(replace(CLEAR, p_wilcoxon=0.2), RULE)  # heavy tails: d = .3 needs 175 pairs, there are 1000
    assert found.n_to_decide is None
    assert "not for want of pairs" in found.reason
    assert "p_wilcoxon is 0.2" in found.reason


def test_reasons_say_on_what_a_verdict_rests() -> None:
    assert "without p_permutation" in verdict(replace(CLEAR, p_permutation=None), RULE).reason
    assert "matter less" in verdict(MIRRORED, RULE).reason
    assert "within ±0.1 and 0.5 ± 0.05" in verdict(NULL, RULE).reason
    assert verdict(replace(CLEAR, missing="one document only"), RULE).reason == "one document only"
    assert "0.001, is below what numerics alone do (0.002)" in verdict(replace(CLEAR, noise_floor=2e-3), RULE).reason
