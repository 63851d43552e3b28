"""Whose fault an error of a group's ranks was, and which of them is told."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from ray.exceptions import RayTaskError

from audit.models.shards.errors import PeerOutOfMemoryError, ShardError
from cluster.driver.group import GroupLostError, TaskError
from cluster.groups.ray_errors import sort_errors, sort_own_errors

GONE = "rank 0 lost the others of its group ([gloo/transport/tcp/pair.cc:547] Connection closed by peer)"


def raised(error: Exception) -> RayTaskError:
    """``error`` as Ray hands it on."""
    return RayTaskError("run", f"{type(error).__name__}: {error}", error)


@pytest.mark.parametrize(
    "others", [ShardError("rank 1 failed, and rank 0 cannot go on without it"), PeerOutOfMemoryError("rank 1 ran out")]
)
def test_of_ranks_that_share_a_task_the_one_that_failed_is_told(others: Exception) -> None:
    found = sort_errors({0: raised(others), 1: raised(ValueError("no such layer"))}, ranks=2)
    assert isinstance(found, TaskError)
    assert "no such layer" in str(found)
    assert found.recycle
    assert str(others) in str(sort_errors({0: raised(others)}, ranks=2))  # where nobody says more


def test_a_rank_that_lost_the_others_blames_no_task() -> None:
    found = sort_errors({0: raised(ShardError(GONE))}, ranks=2)
    assert isinstance(found, GroupLostError)


@pytest.mark.parametrize(
    "errors",
    [
        {0: ShardError("layer 3 could not be fetched (OSError: no such file)")},
        {0: ShardError("rank 1 has no memory left to fetch layers with the others"), 1: MemoryError("none left")},
        {0: ValueError("of the task itself"), 1: ShardError(GONE)},
    ],
)
def test_ranks_with_own_tasks_that_cannot_go_on_together_are_a_lost_group(errors: Mapping[int, Exception]) -> None:
    with pytest.raises(GroupLostError, match=r"could not be fetched|no memory left|Connection closed"):
        sort_own_errors({rank: raised(error) for rank, error in errors.items()}, ranks=2)


def test_errors_of_own_tasks_are_told_by_rank() -> None:
    found = sort_own_errors({0: raised(ValueError("one")), 1: raised(MemoryError("two"))}, ranks=2)
    assert [(rank, str(error).split(": ")[-1], error.recycle) for rank, error in found.items()] == [
        (0, "one", False),
        (1, "two", True),
    ]
