"""Running a missing expert of little weight from a few of its bit planes instead of all of them.

Lossy, and off unless asked for. Shapes: n chosen experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register


@register(
    "scheduler",
    "plane-fallback",
    title="A missing expert of little weight runs from its low-bit planes",
    paper="Fate 2502.12224; D2MoE 2504.15299",
    lossless=False,
    limits="For nested codecs and the native runner. Changes the output, and by how much depends "
    "on what is in memory.",
    options={
        "max_weight": "largest router weight of an expert that may fall back, 0 to 1",
        "planes": "planes that it then runs from",
        "share": "of the expert cache, for experts of so few planes",
    },
)
class PlaneFallback:
    """Says which of the chosen experts run from their first `planes` planes.

    Those are kept in a `share` of the expert cache of their own, and read alone.
    """

    def __init__(self, *, max_weight: float = 0.2, planes: int = 1, share: float = 0.25) -> None:
        if planes < 1 or not 0 <= max_weight <= 1 or not 0 < share < 1:
            raise UserError(
                f"planes {planes} must be 1 or more, max_weight {max_weight} and share {share} "
                "between 0 and 1"
            )
        self.max_weight, self.planes, self.share = max_weight, planes, share

    def falls_back(self, weights: ArrayLike, whole: ArrayLike) -> NDArray[np.bool_]:
        """Which experts fall back, [n]: `weights` [n] is the largest router weight that any token
        gives each, `whole` [n] whether all its planes are in memory."""
        return ~np.asarray(whole, dtype=bool) & (np.asarray(weights) <= self.max_weight)
