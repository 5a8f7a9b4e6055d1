"""Averages weighted entry by entry with the diagonal of the Fisher information.

Shapes: F neurons, P numbers of a neuron, as in `neuron_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.compress.condense.average import Member, average
from moekit.core.expert_weights import ExpertWeights
from moekit.core.neurons import from_rows, neuron_rows

# Of the members' mean information: what an entry that no token moved still counts.
FLOOR = 1e-6


def fisher_average(
    members: Sequence[Member], information: Sequence[Tensor], floor: float = FLOOR
) -> ExpertWeights:
    """Sum of share * information * weight over the sum of share * information, entry by entry.

    `information` [F, P] of each member lies in the group's order of neurons. Equal information
    gives the plain average; where one member's is far above the others' its weight comes out.
    (Fisher merging 2111.09832.)
    """
    if len(members) == 1 and members[0].share == 1:
        return members[0].expert
    least = floor * float(torch.stack([f.double().mean() for f in information]).mean())
    # All zero (no token at all): every entry counts alike.
    least = least or 1.0
    weights = [
        member.share * values.double().clamp_min(least)
        for member, values in zip(members, information, strict=True)
    ]
    rows = [neuron_rows(member.expert).double() for member in members]
    over = torch.stack([w * r for w, r in zip(weights, rows, strict=True)]).sum(0)
    merged = over / torch.stack(weights).sum(0)
    return from_rows(merged, members[0].expert, average(members).down_bias)
