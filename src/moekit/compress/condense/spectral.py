"""Groups by spectral clustering. E experts, R groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from moekit.compress.condense.context import Groups, LayerContext, by_leader
from moekit.compress.condense.features import Array, distances
from moekit.core.registry import register

ROUNDS = 100
STARTS = 8


@register(
    "grouping",
    "spectral",
    title="K-means on the first eigenvectors of the experts' similarity graph",
    paper="UNCURL 2409.01483",
    needs=("data",),
    options={
        "feature": "what alike means: router-logits, mean-output, output, output-cosine or weights"
    },
)
def spectral(context: LayerContext, count: int, *, feature: str = "router-logits") -> Groups:
    """Form `count` groups of experts joined by high affinity, none empty.

    The affinity is 1 - distance where distances are shares of 1, else falls with the square of the
    distance over its median.
    """
    distance = distances(context, feature)
    bounded = feature in ("router-logits", "output-cosine")
    affinity = 1 - distance if bounded else np.exp(-0.5 * (distance / _median(distance)) ** 2)
    degree = np.sqrt(affinity.sum(1))
    laplacian = np.eye(len(affinity)) - affinity / degree[:, None] / degree[None]
    _, vectors = eigh(laplacian, subset_by_index=[0, count - 1])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    label = kmeans(vectors, count, context.order[:STARTS])
    groups = [np.flatnonzero(label == group).tolist() for group in range(count)]
    return Groups(by_leader(context, groups))


def kmeans(points: Array, count: int, firsts: Sequence[int]) -> NDArray[np.int64]:
    """Labels [E] below `count`, every one in use, of the best of several starts on points [E, R].

    A start's first centre is one of the points `firsts`, each next one the point farthest from all
    so far. A group that empties takes the point farthest from its centre.
    """
    return min((_one_start(points, count, first) for first in firsts), key=lambda end: end[1])[0]


def _one_start(points: Array, count: int, first: int) -> tuple[NDArray[np.int64], float]:
    chosen = [first]
    while len(chosen) < count:
        nearest = _squares(points, points[chosen]).min(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    centres = points[chosen]
    label = np.full(len(points), -1)
    for _ in range(ROUNDS):
        apart = _squares(points, centres)
        found = apart.argmin(1)
        for group in range(count):
            if not (found == group).any():
                sizes = np.bincount(found, minlength=count)
                cost = np.where(sizes[found] > 1, apart[np.arange(len(points)), found], -1)
                found[int(cost.argmax())] = group
        if (found == label).all():
            break
        label = found
        centres = np.stack([points[label == group].mean(0) for group in range(count)])
    return label, float(((points - centres[label]) ** 2).sum())


def _squares(points: Array, centres: Array) -> Array:
    return ((points[:, None] - centres[None]) ** 2).sum(-1)


def _median(distance: Array) -> float:
    apart = distance[~np.eye(len(distance), dtype=bool)]
    return float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
