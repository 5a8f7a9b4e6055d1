"""The lines of a dendrogram from an average linkage in SciPy's format [E - 1, 4]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Linkage = NDArray[np.float64]


def leaf_order(tree: Linkage) -> list[int]:
    """The leaves in an order in which no two branches cross."""
    count = len(tree) + 1
    members = {leaf: [leaf] for leaf in range(count)}
    for step, (first, second, *_) in enumerate(tree):
        members[count + step] = members.pop(int(first)) + members.pop(int(second))
    return next(iter(members.values()))


def branches(tree: Linkage, order: list[int]) -> tuple[list[float | None], list[float | None]]:
    """Coordinates of the lines, leaves at 0, 1, ... in `order`; None lifts the pen."""
    place = {leaf: (float(rank), 0.0) for rank, leaf in enumerate(order)}
    x: list[float | None] = []
    y: list[float | None] = []
    for step, (first, second, height, _) in enumerate(tree.tolist()):
        (left, low), (right, other) = place[int(first)], place[int(second)]
        x += [left, left, right, right, None]
        y += [low, height, height, other, None]
        place[len(order) + step] = ((left + right) / 2, height)
    return x, y
