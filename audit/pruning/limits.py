"""What a router needs: how many experts of a layer may be removed, and which must stay.

A router with expert groups (DeepSeek) first chooses ``groups_chosen`` of its groups of consecutive experts, by the
one or two best scores of each, and then its top k among the experts of those. So that every choice of groups holds
top_k experts, each group keeps at least max(2, ceil(top_k / groups_chosen)) of them; without groups a layer keeps
top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audit.models import MoEModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLimits:
    """One layer's experts, how many of them a token is routed to, and the groups they are chosen from."""

    experts: int
    top_k: int
    groups: int = 1
    groups_chosen: int = 1

    @property
    def group_size(self) -> int:
        return self.experts // self.groups

    @property
    def least_per_group(self) -> int:
        """Experts that must stay in each group."""
        if self.groups == 1:
            return self.top_k
        return max(2, -(-self.top_k // self.groups_chosen))

    def first(self, order: Sequence[int], count: int) -> tuple[int, ...]:
        """The first ``count`` experts of ``order`` that may be removed together, ascending.

        One whose group has no expert to spare is passed over. Raises ValueError where there are not ``count``.
        """
        most = self.experts - self.groups * self.least_per_group
        if count > most:
            groups = "" if self.groups == 1 else f" ({self.least_per_group} in each of {self.groups} groups)"
            raise ValueError(
                f"share: {count} of {self.experts} experts cannot be removed, a token is routed to {self.top_k}"
                f"{groups}; at most {max(most, 0)} can"
            )
        left = [self.group_size] * self.groups
        removed: list[int] = []
        for expert in order:
            group = expert // self.group_size
            if len(removed) < count and left[group] > self.least_per_group:
                left[group] -= 1
                removed.append(int(expert))
        assert len(removed) == count, (order, count)
        return tuple(sorted(removed))


def limits_of(config: Any, experts: int, top_k: int) -> RouterLimits:
    """The limits of a layer from its model's (text) configuration."""
    groups, chosen = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    if not groups or groups == 1 or not chosen or getattr(config, "topk_method", None) == "greedy":
        return RouterLimits(experts=experts, top_k=top_k)
    return RouterLimits(experts=experts, top_k=top_k, groups=groups, groups_chosen=chosen)


def model_limits(model: MoEModel) -> dict[int, RouterLimits]:
    """The limits of every MoE layer of a loaded model."""
    config: Any = model.module.config
    text = config.get_text_config()
    return {layer: limits_of(text, site.num_experts, site.top_k) for layer, site in model.sites.items()}
