"""The order in which the bit planes of a layer's experts are read, and which are given up (D2MoE).

A request at level k of an expert needs its planes 0 to k. Shapes: E experts, P planes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.registry import register

Plane = tuple[int, int]


def plane_demand(
    requests: Iterable[tuple[int, int]], num_experts: int, num_planes: int
) -> NDArray[np.int64]:
    """How many requests (expert, level) need each plane, [E, P]: never more than the one below."""
    demand = np.zeros((num_experts, num_planes), dtype=np.int64)
    for expert, level in requests:
        demand[expert, : level + 1] += 1
    return demand


@register(
    "scheduler",
    "hebf",
    title="Read the plane that most requests wait for, each expert's planes in order",
    paper="D2MoE 2504.15299",
    lossless=True,
)
def hebf_order(demand: ArrayLike) -> list[Plane]:
    """Planes (expert, plane) of `demand` [E, P], hottest first, equal ones by expert.

    The planes of an expert come in ascending order, since none is of use without those below it.
    """
    wanted = np.asarray(demand)
    heads = [(-int(row[0]), expert, 0) for expert, row in enumerate(wanted) if row[0] > 0]
    heapq.heapify(heads)
    order = []
    while heads:
        _, expert, plane = heapq.heappop(heads)
        order.append((expert, plane))
        if plane + 1 < wanted.shape[1] and wanted[expert, plane + 1] > 0:
            heapq.heappush(heads, (-int(wanted[expert, plane + 1]), expert, plane + 1))
    return order


def plane_seconds(
    order: Sequence[Plane],
    demand: ArrayLike,
    read_seconds: Sequence[float],
    compute_seconds: Sequence[float],
) -> float:
    """The time of a layer that reads in this order and computes what has come, one at a time each.

    `read_seconds` [P] is of one plane, `compute_seconds` [P] of one request's part of it.
    """
    wanted = np.asarray(demand)
    read = done = 0.0
    for expert, plane in order:
        read += read_seconds[plane]
        done = max(done, read) + float(wanted[expert, plane]) * compute_seconds[plane]
    return done


def planes_to_free(held: Sequence[Plane], sizes: Sequence[int], needed: int) -> list[Plane]:
    """Planes to give up until `needed` bytes are free: the highest first, base planes last.

    `held` are those of layers that have passed, the first to go first; `sizes` [P] bytes. Gives up
    all of them where they are not enough.
    """
    freed, left = [], needed
    # Sorting is stable: planes of equal height keep their order.
    for plane in sorted(held, key=lambda entry: -entry[1]):
        if left <= 0:
            break
        freed.append(plane)
        left -= sizes[plane[1]]
    return freed
