"""Merging neurons of a group wherever they are alike, within an expert too (ZipIt).

Shapes: G experts of a group, F neurons, P numbers of a neuron, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.compress.condense.agglomerate import agglomerate
from moekit.compress.condense.average import Member, average
from moekit.core.expert_weights import ExpertWeights
from moekit.core.neurons import PARTS, from_rows, neuron_rows
from moekit.ops.align import correlation


def zip_neurons(members: Sequence[Member], middles: Sequence[Tensor]) -> ExpertWeights:
    """One expert of F neurons from G experts, by the correlation of their neurons' activations.

    `middles` [T, F] are the members' inputs of the down projection on the same tokens. The two most
    correlated of the G F neurons (clusters: on average) become one until F are left. A new neuron
    reads with the mean of its neurons' rows, by share, and writes the sum of their columns times
    share, so that the group computes the mean of its experts (ZipIt 2305.03053). Memory grows with
    (G F) squared.
    """
    if len(members) == 1:
        return average(members)
    values = torch.cat([middle.float() for middle in middles], dim=1)
    rows = torch.cat([neuron_rows(member.expert) for member in members])
    width = len(rows) // len(members)
    share = torch.cat([torch.full((width,), member.share) for member in members])
    clusters = agglomerate(_distance(values), width)
    like = members[0].expert
    writes = _is_written(like)
    made = torch.empty(width, rows.shape[1])
    for place, cluster in enumerate(clusters):
        held, part = rows[cluster], share[cluster].unsqueeze(1)
        total = (held * part).sum(0)
        made[place] = torch.where(writes, total, total / part.sum())
    return from_rows(made, like, average(members).down_bias)


def _is_written(like: ExpertWeights) -> Tensor:
    """Which of the P numbers of a neuron belong to its down column."""
    parts = like.tensors()
    flags = []
    for name in PARTS:
        if name in parts:
            size = parts[name].shape[0 if name == "down" else 1] if parts[name].ndim == 2 else 1
            flags.append(torch.full((size,), name == "down"))
    return torch.cat(flags)


def _distance(values: Tensor) -> Any:
    apart = 1 - correlation(values, values)
    return ((apart + apart.T) / 2).clamp_min(0).fill_diagonal_(0).numpy()
