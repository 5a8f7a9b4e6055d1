"""Agglomerative clustering down to a number of clusters. N things."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

LINKAGES = ("average", "single", "complete")


def agglomerate(
    distance: NDArray[np.float64], count: int, method: str = "average"
) -> list[list[int]]:
    """Join the two nearest clusters until `count` are left, from symmetric distances [N, N].

    Whole steps rather than a cut at a height, which gives fewer clusters where heights tie.
    """
    number = len(distance)
    held = {n: [n] for n in range(number)}
    if count < number:
        steps = linkage(squareform(distance, checks=False), method)
        for step, (first, second, *_) in enumerate(steps[: number - count]):
            held[number + step] = held.pop(int(first)) + held.pop(int(second))
    return sorted(sorted(cluster) for cluster in held.values())
