"""Using the bit planes of an expert that are in memory instead of waiting for the others.

Lossy, and off unless asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register


@register(
    "scheduler",
    "plane-fallback",
    title="A missing expert of little weight runs from the low-bit planes in memory",
    paper="Fate 2502.12224; D2MoE 2504.15299",
    lossless=False,
    limits="For nested codecs. Changes the output, and by how much depends on what is in memory.",
    options={
        "min_planes": "planes that must be in memory",
        "max_weight": "largest router weight of an expert that may fall back, 0 to 1",
    },
)
class PlaneFallback:
    """Says which planes of the chosen experts to use."""

    def __init__(self, *, min_planes: int = 1, max_weight: float = 0.1) -> None:
        if min_planes < 1 or not 0 <= max_weight <= 1:
            raise UserError(
                f"min_planes {min_planes} must be 1 or more and max_weight {max_weight} in 0 to 1"
            )
        self.min_planes, self.max_weight = min_planes, max_weight

    def planes(
        self, weights: ArrayLike, resident: ArrayLike, total: ArrayLike
    ) -> NDArray[np.int64]:
        """Planes to compute each of n experts with, [n].

        `weights` [n] is the largest router weight that any token gives the expert, `resident` [n]
        and `total` [n] count its planes in memory and in all. Where the answer exceeds `resident`,
        the rest is to be read.
        """
        held, all_planes = np.asarray(resident), np.asarray(total)
        light = np.asarray(weights) <= self.max_weight
        falls_back = light & (held >= self.min_planes)
        return np.where(falls_back, np.minimum(held, all_planes), all_planes).astype(np.int64)
