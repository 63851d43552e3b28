"""Corrections against their definitions, written out as loops."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from audit.statistics import benjamini_hochberg, bonferroni, holm

P = np.array([0.04, np.nan, 0.001, 0.01, 0.03, 0.01, 0.9, np.nan])
TESTS = 6


def test_bonferroni_multiplies_by_the_tests_that_were_made() -> None:
    np.testing.assert_allclose(bonferroni(P), np.minimum(P * TESTS, 1), rtol=1e-12)


def test_holm_and_benjamini_hochberg_step_through_the_order() -> None:
    down, up = np.full(len(P), np.nan), np.full(len(P), np.nan)
    order = [int(index) for index in np.argsort(P) if not np.isnan(P[index])]
    reached = 0.0
    for rank, index in enumerate(order):
        reached = down[index] = max(reached, min(1.0, P[index] * (TESTS - rank)))
    reached = 1.0
    for rank in range(TESTS - 1, -1, -1):
        reached = up[order[rank]] = min(reached, P[order[rank]] * TESTS / (rank + 1))
    np.testing.assert_allclose(holm(P), down, rtol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(P), up, rtol=1e-12)


@pytest.mark.parametrize("tests", [1, 2, 60])
def test_holm_is_that_of_statsmodels(tests: int) -> None:
    p = np.round(np.random.default_rng(tests).random(tests) ** 4, 2)  # with ties and zeros
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)


@pytest.mark.parametrize("correction", [bonferroni, holm, benjamini_hochberg])
@pytest.mark.parametrize("p", [[], [np.nan, np.nan], [0.2]])
def test_families_of_none_and_one_stay_as_they_are(correction: object, p: list[float]) -> None:
    assert callable(correction)
    np.testing.assert_array_equal(correction(np.array(p)), np.array(p))
