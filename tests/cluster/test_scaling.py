"""The number of groups, against what a person would work out."""

from __future__ import annotations

import random

import pytest

from cluster.driver.scaling import Scale, groups_wanted


def wanted(scale: Scale, seconds: float = 1000.0, elapsed: float = 0.0, tasks: int = 10**6, held: int = 0) -> int:
    return groups_wanted(scale, group_seconds=seconds, elapsed=elapsed, tasks=tasks, held=held)


def test_without_a_target_as_many_as_allowed_and_as_there_are_tasks_for() -> None:
    scale = Scale(min_groups=2, max_groups=8)
    assert [wanted(scale, tasks=tasks) for tasks in (0, 1, 5, 8, 100)] == [0, 1, 5, 8, 8]


@pytest.mark.parametrize(
    ("seconds", "elapsed", "groups"),
    [
        (1000, 0, 10),  # 1000 s of work in 100 s
        (1001, 0, 11),
        (1000, 50, 20),  # in 50 s
        (99, 0, 2),  # one would do, but at least two are held
        (1e6, 0, 32),  # at most 32
        (10, 100, 32),  # the time is over: as fast as possible
        (10, 500, 32),
        (0, 500, 32),
    ],
)
def test_the_rest_of_the_work_fits_into_the_rest_of_the_time(seconds: float, elapsed: float, groups: int) -> None:
    scale = Scale(min_groups=2, max_groups=32, target_seconds=100.0)
    assert wanted(scale, seconds, elapsed) == groups


def test_with_no_least_number_one_group_still_works() -> None:
    scale = Scale(min_groups=0, max_groups=4, target_seconds=1e9)
    assert wanted(scale, 1.0) == 1
    assert wanted(scale, 0.0) == 1
    assert wanted(scale, 1.0, tasks=0) == 0


def test_a_group_is_given_back_only_with_slack() -> None:
    scale = Scale(max_groups=32, target_seconds=100.0)
    assert wanted(scale, 950.0, held=11) == 11  # ten would just do
    assert wanted(scale, 790.0, held=11) == 10  # ten would do in 79 s
    assert wanted(scale, 950.0, held=3) == 10


def test_it_does_not_flap_where_the_measured_rate_wavers_by_a_tenth() -> None:
    draw = random.Random(0)
    scale = Scale(max_groups=100, target_seconds=1000.0)
    held, changes = 0, 0
    left = 20_000.0  # group seconds
    for second in range(0, 900, 10):
        now = groups_wanted(scale, group_seconds=left * draw.uniform(0.9, 1.1), elapsed=second, tasks=10**6, held=held)
        changes += now != held
        held = now
        left -= 10 * held
    assert left <= 20_000 * 0.12
    assert changes < 12


def test_work_is_done_in_time_by_about_as_few_groups_as_can_do_it() -> None:
    """Whatever the predictions were worth: simulated with rates that are measured as the work goes on."""
    for wrong in (0.25, 1.0, 4.0):
        scale = Scale(min_groups=0, max_groups=1000, target_seconds=1000.0)
        left, second, used, held = 50_000.0, 0, 0.0, 0
        while left > 0:
            predicted = left * wrong if second < 30 else left
            held = groups_wanted(scale, group_seconds=predicted, elapsed=second, tasks=10**6, held=held)
            left -= held
            used += held
            second += 1
        assert second <= 1001
        assert used <= 50_000 + 200
