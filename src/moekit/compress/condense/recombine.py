"""Handing the neurons of dropped experts to the kept ones (DERN 2509.10377).

Shapes: N segments (neurons) in a pool, F neurons of an expert, P numbers of a neuron.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moekit.core.expert_weights import ExpertWeights
from moekit.core.neurons import from_rows, neuron_rows

ROUNDS = 25


def recombine(
    expert: ExpertWeights,
    importance: float,
    received: Tensor,
    received_importance: Tensor,
    tau: float,
) -> ExpertWeights:
    """The expert with its own and the `received` segments [N, P] clustered back to its F neurons.

    A received segment weighs `received_importance` [N], an own one `importance`. Spherical weighted
    k-means from the segments with the largest gate entries, of those alike by cosine above `tau`
    one; inside a cluster segments are brought to its mean norm and averaged. Nothing received
    leaves the expert as it is.
    """
    if not len(received):
        return expert
    own = neuron_rows(expert)
    pool = torch.cat([own, received.float()])
    weight = torch.cat([torch.full((len(own),), float(importance)), received_importance.float()])
    centres = spherical_kmeans(pool, weight, first_centres(pool, len(own), _reading(expert), tau))
    return from_rows(centres, expert)


def first_centres(pool: Tensor, count: int, reading: int, tau: float) -> Tensor:
    """`count` segments with the largest |entry| among the first `reading` numbers, all different.

    What is alike to a chosen segment (cosine above `tau`) is passed over while others are left: a
    dropped twin would otherwise take two places for every neuron and push out half of them. The
    paper says nothing of this case.
    """
    unit = normalize(pool, dim=1)
    order = pool[:, :reading].abs().amax(1).argsort(descending=True, stable=True).tolist()
    chosen: list[int] = []
    copies: list[int] = []
    nearest = torch.full((len(pool),), -1.0)
    for segment in order:
        if len(chosen) == count:
            break
        if nearest[segment] > tau:
            copies.append(segment)
            continue
        chosen.append(segment)
        nearest = torch.maximum(nearest, unit @ unit[segment])
    return pool[torch.tensor([*chosen, *copies[: count - len(chosen)]])]


def spherical_kmeans(pool: Tensor, weight: Tensor, centres: Tensor) -> Tensor:
    """Centres [F, P] after weighted k-means by cosine; an empty one keeps its value."""
    unit, norms = normalize(pool, dim=1), pool.norm(dim=1)
    label = torch.full((len(pool),), -1)
    for _ in range(ROUNDS):
        found = (unit @ normalize(centres, dim=1).T).argmax(1)
        if torch.equal(found, label):
            break
        label = found
        mass = torch.zeros(len(centres)).index_add_(0, label, weight)
        members = torch.zeros(len(centres)).index_add_(0, label, torch.ones(len(pool)))
        mean_norm = torch.zeros(len(centres)).index_add_(0, label, norms) / members.clamp_min(1)
        weighted = weight.where(mass[label] > 0, 1.0)
        total = torch.zeros_like(centres).index_add_(0, label, unit * weighted.unsqueeze(1))
        scale = torch.zeros(len(centres)).index_add_(0, label, weighted).clamp_min(1e-30)
        moved = total / scale.unsqueeze(1) * mean_norm.unsqueeze(1)
        centres = torch.where((members > 0).unsqueeze(1), moved, centres)
    return centres


def _reading(expert: ExpertWeights) -> int:
    """How many of a neuron's numbers are its gate row (its up row, without a gate)."""
    row = expert.gate if expert.gate is not None else expert.up
    return expert.down.shape[0] if row is None else row.shape[1]
