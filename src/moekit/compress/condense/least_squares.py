"""Refitting a merged expert to what the experts of its group computed (PLeaS).

Shapes: T tokens, F neurons, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.compress.condense.average import Member, average
from moekit.core.expert_weights import ExpertWeights
from moekit.ops.regression import regression_mean as ops_mean
from moekit.ops.regression import solved


class Target(NamedTuple):
    """Tokens of one expert: what the merged expert's down projection reads there, what the expert
    gave, and the gate weight that the token gave it. [T, F], [T, D], [T]."""

    middle: Tensor
    output: Tensor
    gate: Tensor


def refit_down(start: ExpertWeights, targets: Iterable[Target], ridge: float) -> ExpertWeights:
    """`start` with the down projection that best gives every member's outputs on its own tokens.

    Minimises the sum over tokens of |gate (D m - y)|^2 plus ridge * |D - D_start|^2 in closed form,
    so the first sum never exceeds that of `start`. Without tokens the start stays.
    (PLeaS 2407.02447, its last step, solved exactly instead of by gradient descent.)
    """
    width, outputs = start.down.shape[1], start.down.shape[0]
    moment = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(outputs, width, dtype=torch.float64)
    bias = 0.0 if start.down_bias is None else start.down_bias.double()
    for target in targets:
        middle = target.middle.double() * target.gate.double().unsqueeze(1)
        wanted = (target.output.double() - bias) * target.gate.double().unsqueeze(1)
        moment += middle.T @ middle
        cross += wanted.T @ middle
    down = solved(moment, cross, start.down, ridge)
    return replace(start, down=down)


def regression_mean(
    members: Sequence[Member], moments: Sequence[Tensor], ridge: float
) -> ExpertWeights:
    """Gate and up rows that best give the members' on their own inputs; the rest by share.

    Minimises the sum over members of share * |X (W - W_member)^T|^2 by the second moments X^T X
    [D, D] of the members' inputs, plus ridge * |W - W_mean|^2 (RegMean 2212.09849). Equal moments
    give the average.
    """
    mean = average(members)
    if len(members) == 1:
        return mean
    shares = [member.share for member in members]
    made = {}
    for name in ("gate", "up"):
        centre = getattr(mean, name)
        if centre is not None:
            matrices = [getattr(member.expert, name) for member in members]
            made[name] = ops_mean(matrices, moments, shares, centre, ridge)
    return replace(mean, **made)
