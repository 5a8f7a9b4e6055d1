"""Averages within the space that the experts of a group share (Sub-MoE). O rows, D columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moekit.compress.condense.average import Member, average
from moekit.core.expert_weights import ExpertWeights
from moekit.ops.lowrank import row_space

MATRICES = ("gate", "up", "down")


def subspace_average(members: Sequence[Member], keep: float) -> ExpertWeights:
    """The average of a group, each matrix on the main left singular vectors of all of them.

    The matrices [O, D] of a group stand side by side, [W1 W2 ...] = U S [V1 V2 ...]; the V are
    averaged by share. With every vector that is the plain average, so `keep`, the share of the O
    vectors that stay, is what makes the method (Sub-MoE 2506.23266). A V is a block of columns: the
    baseline in the code of REAP cuts the factor by reshape, which mixes the experts' columns.
    """
    mean = average(members)
    if len(members) == 1:
        return mean
    made = {}
    for name in MATRICES:
        target = getattr(mean, name)
        if target is None:
            continue
        side_by_side = torch.cat([getattr(m.expert, name).double() for m in members], dim=1)
        rank = max(1, round(keep * len(side_by_side)))
        if rank < len(side_by_side):
            space = row_space(side_by_side.T, rank)
            projected = space.decode.T @ (space.decode @ target.double())
            made[name] = projected.to(target.dtype)
    return replace(mean, **made)
