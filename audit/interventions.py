"""Interventions: what is done to which of a token's experts (the do-operators of the audit).

Each replaces the Mixture-of-Experts output y at one layer; c_i is the contribution (routing weight times output) of
expert i.

============= ==========================================================================================
kind          output under do(.)
============= ==========================================================================================
zero          y - c_i: the expert says nothing, nobody else changes (arXiv 2606.10703)
renormalize   the remaining contributions, scaled so that their routing weights keep the total mass
reroute       expert i is struck from the router's candidates; the router chooses again by its own rule
mean          E_i replaced by its mean over the calibration tokens routed to i (arXiv 2507.00390)
resample      E_i replaced by one of its stored calibration outputs
scale         y + (factor - 1) c_i (arXiv 2601.10159); factor 0 is ``zero``, 1 is the identity
============= ==========================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["zero", "renormalize", "reroute", "mean", "resample", "scale"]
Selection = Literal["each", "all", "highest", "lowest", "random", "ranked", "listed", "shared"]
Scope = Literal["token", "sequence"]

KINDS: tuple[str, ...] = get_args(Kind)
SELECTIONS: tuple[str, ...] = get_args(Selection)
NEEDS_CALIBRATION = frozenset({"mean", "resample"})
COUNTED = ("highest", "lowest", "random", "ranked")  # selections of a number of experts


@dataclass(frozen=True, slots=True)
class Target:
    """Which of a token's active experts an intervention acts on.

    ``each``: every active expert by itself, one effect per slot (``experts`` restricts it to those ids).
    ``all``, ``highest``, ``lowest``: one *set* per token: all active experts, or the ``count`` of highest or
    lowest routing weight. ``random``: one set per token and draw, the first ``count`` in a random order of the
    active experts, drawn by a hash of (engine seed, sequence, position, layer, draw): the same in any batch, and a
    set of n + 1 holds that of n. ``ranked``: one set per token, the ``count`` active experts whose value of the
    metric named is largest, of equal values the lower expert id first (``Engine.measure`` takes the values, oriented
    so that high means important). ``listed``: one set per token, the active ones among ``experts``. ``shared``:
    the layer's shared experts, as one unit.
    """

    selection: Selection = "each"
    count: int | None = None
    experts: tuple[int, ...] | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"target: {self.selection!r} is unknown; known are {', '.join(SELECTIONS)}")
        if self.selection in COUNTED and (self.count is None or self.count < 1):
            raise ValueError(f"target.{self.selection}: {self.count} experts cannot be removed; at least 1 is needed")
        if self.selection not in COUNTED and self.count is not None:
            raise ValueError(
                f"target.count: {self.count} has no meaning for {self.selection!r}; it goes with {', '.join(COUNTED)}"
            )
        if (self.selection == "ranked") != bool(self.metric):
            raise ValueError(
                f"target.metric: {self.metric!r} does not fit {self.selection!r}; ranked needs the name of a metric, "
                "the others take none"
            )
        if self.selection not in ("each", "listed") and self.experts is not None:
            raise ValueError(
                f"target.experts: {list(self.experts)} have no meaning for {self.selection!r}; use each or listed"
            )
        if self.experts is not None and not self.experts:
            raise ValueError("target.experts: the list is empty; name at least one expert id, or leave it out")
        if self.selection == "listed" and not self.experts:
            raise ValueError("target.experts: a listed target needs at least one expert id")

    @property
    def name(self) -> str:
        """The selection as the effect table names it; with its metric (``ranked:reap``) where one ranks."""
        return f"ranked:{self.metric}" if self.selection == "ranked" else self.selection


@dataclass(frozen=True, slots=True)
class Intervention:
    """One do-operator with its target. ``factor`` belongs to ``scale``; ``draws`` is how many times chance decides:
    which stored output ``resample`` inserts, which experts a ``random`` target takes.
    """

    kind: Kind = "zero"
    target: Target = field(default_factory=Target)
    factor: float | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"intervention.kind: {self.kind!r} is unknown; known are {', '.join(KINDS)}")
        if (self.kind == "scale") != (self.factor is not None):
            raise ValueError(
                f"intervention.factor: {self.factor} does not fit kind {self.kind!r}; scale needs one, the "
                "others take none"
            )
        if self.factor is not None and not math.isfinite(self.factor):
            raise ValueError(f"intervention.factor: {self.factor} is not a finite number")
        if self.draws < 1 or (self.draws > 1 and not self.drawn):
            raise ValueError(
                f"intervention.draws: {self.draws} does not fit kind {self.kind!r} with target "
                f"{self.target.selection!r}; resample and random take 1 or more, the others exactly 1"
            )
        if self.target.selection == "shared" and self.kind not in ("zero", "scale"):
            raise ValueError(
                f"intervention.target: shared experts take zero and scale, not {self.kind!r}: they have no "
                "routing weight"
            )
        if self.target.selection == "all" and self.kind in ("renormalize", "reroute"):
            raise ValueError(
                f"intervention.target: {self.kind!r} of all active experts leaves nothing to carry their "
                "weight; name fewer"
            )

    @property
    def drawn(self) -> bool:
        """Whether chance decides something, so that effects are told apart by their draw."""
        return self.kind == "resample" or self.target.selection == "random"

    def check(self, top_k: int, experts: int, has_shared: bool) -> None:
        """Raise ValueError where a layer with ``experts`` experts, ``top_k`` active, cannot take this intervention."""
        target = self.target
        if target.count is not None and target.count > top_k:
            raise ValueError(
                f"intervention.target.{target.selection}: {target.count} experts to remove, but a token has "
                f"{top_k} active ones; name at most {top_k}"
            )
        if target.selection == "each" and top_k == 1 and self.kind == "renormalize":
            raise ValueError(
                "intervention: renormalize needs a second active expert to carry the weight, but a token has only 1"
            )
        if target.count == top_k and self.kind == "renormalize":
            raise ValueError(
                f"intervention.target.{target.selection}: renormalize of all {top_k} active experts leaves no "
                f"weight; name at most {top_k - 1}"
            )
        removed = target.count or (len(target.experts) if target.experts and target.selection == "listed" else 1)
        if self.kind == "reroute" and experts - removed < top_k:
            raise ValueError(
                f"intervention: reroute without {removed} of {experts} experts leaves the router fewer than "
                f"its top {top_k}"
            )
        for expert in target.experts or ():
            if not 0 <= expert < experts:
                raise ValueError(
                    f"intervention.target.experts: {expert} is not an expert; the layer has 0 to {experts - 1}"
                )
        if target.selection == "shared" and not has_shared:
            raise ValueError("intervention.target: shared, but this model has no shared experts")
