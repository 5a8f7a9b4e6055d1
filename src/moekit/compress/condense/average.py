"""Members of a group and their plain average, the start of every other fuser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moekit.core.expert_weights import ExpertWeights
from moekit.core.new_experts import fold


@dataclass(frozen=True)
class Member:
    """One expert of a group: its share, its weights with neurons in the group's order, its id."""

    share: float
    expert: ExpertWeights
    id: int = 0


def average(members: Sequence[Member]) -> ExpertWeights:
    """Sum of the members' weights times their shares; a lone one of share 1 stays as it is."""
    shares = {number: member.share for number, member in enumerate(members)}
    return fold(shares, lambda number: members[number].expert)
