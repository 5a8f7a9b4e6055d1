"""Weighted sums of experts, the start of every other fuser. F neurons, D width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moekit.core.expert_weights import ExpertWeights


@dataclass(frozen=True)
class Member:
    """One expert of a group: its weights, neurons in the group's order, and its share."""

    share: float
    expert: ExpertWeights


def average(members: Sequence[Member]) -> ExpertWeights:
    """Sum of the members' weights times their shares, in float32; a lone member with share 1 is
    given back as it is."""
    if len(members) == 1 and members[0].share == 1:
        return members[0].expert
    parts = [member.expert.tensors() for member in members]
    made = {}
    for name, like in parts[0].items():
        total = like.float() * members[0].share
        for member, part in zip(members[1:], parts[1:], strict=True):
            total += part[name].float() * member.share
        made[name] = total.to(like.dtype)
    return replace(members[0].expert, **made)
