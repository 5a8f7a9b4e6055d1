"""From scores to the experts that stay: how many a layer keeps, which of them it must, and groups.

A router that is limited by groups needs the same number of experts in every group, so such a layer
chooses within each group. E experts of a layer.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from moekit.compress.prune.saliency import Scores, share
from moekit.core.errors import UserError


@dataclass(frozen=True)
class Room:
    """What one layer may look like: `count` of `num_experts` stay, all `protected` among them.

    `layer` is the decoder layer. With several groups `count` is a multiple of `num_groups`. Raises
    UserError where a group protects more experts than it keeps.
    """

    layer: int
    num_experts: int
    count: int
    num_groups: int = 1
    protected: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        held = Counter(self.group_of(e) for e in self.protected)
        for group, number in sorted(held.items()):
            if number > self.per_group:
                where = "" if self.num_groups == 1 else f" in group {group}"
                raise UserError(
                    f"layer {self.layer}: {number} experts are protected{where}, but only "
                    f"{self.per_group} of {self.size} are to stay there; keep more or protect "
                    "fewer."
                )

    @property
    def size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups

    @property
    def per_group(self) -> int:
        """Experts of one group that stay."""
        return self.count // self.num_groups

    def group_of(self, expert: int) -> int:
        return expert // self.size

    def gone(self, keep: Sequence[int]) -> list[int]:
        """The experts that a set leaves out."""
        return sorted(set(range(self.num_experts)) - set(keep))

    def best(self, scores: Tensor) -> list[int]:
        """The protected experts and those with the highest scores [E], ties to the lower id."""
        keep: list[int] = []
        for group in self.groups():
            ranked = sorted(group, key=lambda e: (e not in self.protected, -float(scores[e]), e))
            keep += ranked[: self.per_group]
        return sorted(keep)

    def groups(self) -> list[list[int]]:
        """The experts of every group."""
        return [
            list(range(start, start + self.size))
            for start in range(0, self.num_groups * self.size, self.size)
        ]

    def subsets(self) -> int:
        """How many sets of experts there are to choose from."""
        return math.prod(
            math.comb(len(free), need) for free, need in map(self._free, self.groups())
        )

    def every_subset(self) -> Iterator[list[int]]:
        """All of them, each sorted."""
        free = map(self._free, self.groups())
        choices = [itertools.combinations(experts, need) for experts, need in free]
        for parts in itertools.product(*choices):
            yield sorted([*self.protected, *itertools.chain(*parts)])

    def _free(self, group: list[int]) -> tuple[list[int], int]:
        """The experts of a group that may go, and how many of them stay."""
        free = [e for e in group if e not in self.protected]
        return free, self.per_group - (len(group) - len(free))

    def removable(self, keep: Sequence[int]) -> list[int]:
        """The experts of a set, still too large, that may be taken out next."""
        held = Counter(map(self.group_of, keep))
        return [
            e for e in keep if e not in self.protected and held[self.group_of(e)] > self.per_group
        ]

    def exchanges(self, keep: Sequence[int]) -> Iterator[list[int]]:
        """The sets with one expert exchanged for another of its group."""
        gone = self.gone(keep)
        for out in keep:
            if out in self.protected:
                continue
            for into in gone:
                if self.group_of(into) == self.group_of(out):
                    yield sorted([*(e for e in keep if e != out), into])


def spread(rooms: Sequence[Room], scores: Scores, least: Sequence[int]) -> list[Room]:
    """The rooms with their total number of experts spread over the layers by one common threshold.

    `scores` [E] a layer count as shares of their layer, since layers differ in scale, and no layer
    goes below `least` (M-SMoE's rule, 2310.01334). Layers with groups lose one expert in each at a
    time. Raises UserError where the layers cannot go low enough.
    """
    wanted = sum(room.num_experts - room.count for room in rooms)
    steps: list[tuple[float, int, int]] = []
    for position, (room, layer_scores, low) in enumerate(zip(rooms, scores, least, strict=True)):
        costs = _costs(room, share(layer_scores))
        able = (room.num_experts - max(low, _held(room))) // room.num_groups
        steps += [(cost, position, number) for number, cost in enumerate(costs[:able])]
    heapq.heapify(steps)
    removed = [0] * len(rooms)
    while sum(removed) < wanted and steps:
        _, position, _ = heapq.heappop(steps)
        step = rooms[position].num_groups
        if sum(removed) + step <= wanted:
            removed[position] += step
    if sum(removed) < wanted:
        raise UserError(
            f"{wanted} experts are to go, but only {sum(removed)} can: each layer must keep what "
            "its router chooses and what is protected. Remove fewer."
        )
    return [
        replace(room, count=room.num_experts - number)
        for room, number in zip(rooms, removed, strict=True)
    ]


def _held(room: Room) -> int:
    """The fewest experts a layer can keep because of its protected ones."""
    held = Counter(map(room.group_of, room.protected))
    return room.num_groups * max(held.values(), default=0)


def _costs(room: Room, shares: Tensor) -> list[float]:
    """What the first, second, ... removal from a layer costs, for each expert that goes."""
    ranked = [
        sorted(float(shares[e]) for e in group if e not in room.protected)
        for group in room.groups()
    ]
    return [sum(row) / len(row) for row in zip(*ranked, strict=False)]
