"""Neurons of dropped experts and the kept experts that they are most like (DERN 2509.10377).

Shapes: E experts, F neurons, P numbers of a neuron. A segment is one neuron of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moekit.compress.condense.context import Groups, LayerContext
from moekit.core.expert_weights import ExpertWeights
from moekit.core.neurons import neuron_rows
from moekit.core.registry import register

TAU = 0.6


@dataclass(frozen=True)
class Owners:
    """For every segment of a dropped expert the kept expert with the most similar one.

    `expert` [F] is -1 where no cosine exceeds the threshold.
    """

    expert: Tensor
    cosine: Tensor


def owners(
    kept: Sequence[int],
    dropped: Sequence[int],
    read: Callable[[int], ExpertWeights],
    tau: float,
    gate: bool,
) -> dict[int, Owners]:
    """Find the owner of every segment of `dropped` among `kept`; without the gate's row if asked.

    The segments of the dropped experts are held in memory together, the kept ones read one by one.
    """
    segments = {e: normalize(neuron_rows(read(e), gate=gate), dim=1) for e in dropped}
    best = {e: torch.full((len(rows),), -1.0) for e, rows in segments.items()}
    owner = {e: torch.full((len(rows),), -1) for e, rows in segments.items()}
    for expert in kept:
        own = normalize(neuron_rows(read(expert), gate=gate), dim=1)
        for e, rows in segments.items():
            cosine = (rows @ own.T).amax(1)
            owner[e] = torch.where(cosine > best[e], expert, owner[e])
            best[e] = torch.maximum(cosine, best[e])
    return {e: Owners(owner[e].where(best[e] > tau, -1), best[e]) for e in dropped}


@register(
    "grouping",
    "segments",
    title="The most important experts lead; each other one joins the owner of most of its neurons",
    paper="DERN 2509.10377",
    needs=("weights", "data"),
    limits="An expert none of whose neurons is like a kept one is dropped. DERN itself hands over "
    "single neurons: grouping `drop` with fuser `recombine`.",
    options={
        "tau": "least cosine of two neurons that counts as alike",
        "use_gate": "compare gate rows too",
    },
)
def segments(
    context: LayerContext, count: int, *, tau: float = TAU, use_gate: bool = False
) -> Groups:
    """Form `count` groups by whole experts."""
    leaders, others = context.order[:count], context.order[count:]
    found = owners(leaders, others, context.read, tau, use_gate)
    groups = {leader: [leader] for leader in leaders}
    dropped = []
    for expert in others:
        owned = found[expert].expert
        owned = owned[owned >= 0]
        if len(owned):
            groups[int(owned.bincount().argmax())].append(expert)
        else:
            dropped.append(expert)
    return Groups(list(groups.values()), sorted(dropped))
