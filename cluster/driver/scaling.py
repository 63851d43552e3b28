"""How many groups a run should hold: a pure function of what is left to do and of the time it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A group is given back only where the rest would still be done this much faster than asked for: measured rates waver,
# and loading a model again costs more than holding it a little longer.
_SLACK = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many groups a run may hold. ``target_seconds``: how long it should take; None: as many groups as allowed.

    ``flops_per_second``: what one group is predicted to do, until it is measured.
    """

    min_groups: int = 1
    max_groups: int = 1
    target_seconds: float | None = None
    flops_per_second: float = 1.0

    def __post_init__(self) -> None:
        assert 0 <= self.min_groups <= self.max_groups
        assert self.max_groups > 0


def groups_wanted(scale: Scale, *, group_seconds: float, elapsed: float, tasks: int, held: int) -> int:
    """The number of groups to hold. ``group_seconds``: what one group alone would need for the rest.

    ``elapsed``: seconds since the run began. ``tasks``: how many could run at once; a group without one is not wanted.
    ``held``: groups there are now; fewer are wanted only where fewer would do with some slack.
    """
    if scale.target_seconds is None:
        needed = scale.max_groups
    else:
        left = scale.target_seconds - elapsed
        needed = _groups(group_seconds, left, scale.max_groups)
        if needed < held:
            needed = min(held, _groups(group_seconds * _SLACK, left, scale.max_groups))
        # With no group at all nothing is ever done.
        needed = min(scale.max_groups, max(scale.min_groups, needed, 1))
    return min(needed, tasks)


def _groups(group_seconds: float, left: float, most: int) -> int:
    """How many finish in the time that is left; all there may be where it is over."""
    return min(most, math.ceil(group_seconds / left)) if group_seconds < left * most else most
