"""What a grouping sees of one MoE layer, and what it answers. E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.stats import ExpertStats


@dataclass(frozen=True)
class LayerContext:
    """Experts of one MoE layer: their statistics, their weights, and how much each matters.

    `importance` [E] is a saliency; `read(e)` gives the original weights of expert e. What a
    grouping leaves to chance is keyed by `seed`. Experts are numbered from 0; `ids` are their
    numbers in the layer, all of it by default.
    """

    stats: ExpertStats
    position: int
    importance: Tensor
    read: Callable[[int], ExpertWeights]
    seed: int = 0
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids:
            count = self.stats.layers[self.position].num_experts
            object.__setattr__(self, "ids", tuple(range(count)))

    def only(self, experts: Sequence[int]) -> LayerContext:
        """The same layer with some of its experts, numbered anew."""
        chosen = list(experts)
        return LayerContext(
            self.stats,
            self.position,
            self.importance[chosen],
            lambda e: self.read(chosen[e]),
            self.seed,
            tuple(self.ids[e] for e in chosen),
        )

    def statistic(self, name: str, axes: int) -> Tensor:
        """A statistic of the layer with the experts in play on its first `axes` axes."""
        values = self.stats.get(self.position, name)
        for axis in range(axes):
            values = values.index_select(axis, torch.tensor(self.ids, device=values.device))
        return values

    @property
    def num_experts(self) -> int:
        return len(self.ids)

    @property
    def index(self) -> int:
        return self.stats.layers[self.position].index

    @cached_property
    def order(self) -> list[int]:
        """Expert ids, the most important first; of equals the lower id."""
        values = self.importance.tolist()
        return sorted(range(self.num_experts), key=lambda e: (-values[e], e))


@dataclass(frozen=True)
class Groups:
    """Experts that become one: each group with its leader first; experts in none are dropped."""

    groups: list[list[int]]
    dropped: list[int] = field(default_factory=list)

    def check(self, context: LayerContext, count: int) -> None:
        """Raise UserError unless every expert occurs once and there are `count` groups."""
        named = sorted([*self.dropped, *(e for group in self.groups for e in group)])
        if named != list(range(context.num_experts)) or len(self.groups) != count:
            raise UserError(
                f"the grouping gave {len(self.groups)} groups of experts {named} for layer "
                f"{context.index}; it should give {count} groups of {context.num_experts} experts."
            )


def by_leader(context: LayerContext, groups: list[list[int]]) -> list[list[int]]:
    """Groups with their most important member first, ordered by it."""
    rank = {expert: place for place, expert in enumerate(context.order)}
    ordered = [sorted(group, key=rank.__getitem__) for group in groups]
    return sorted(ordered, key=lambda group: rank[group[0]])
