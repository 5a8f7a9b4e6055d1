"""One score decides which experts an expert cache keeps; the known policies are settings of it.

The lowest score is evicted. Score = frequency term, or a static profile, or knowledge of the
future; ties go to the less recently used expert, so all terms off is LRU. Policies see routing
only, never tensors. Shapes: N streams (layers, say), E experts, K chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register_preset, registry

# A score is primary * CLOCK + time of last use: exact in float64 up to 8e6 uses and 1e9 accesses.
CLOCK = 2.0**30

Future = Literal["none", "window", "next use"]


@dataclass(frozen=True, kw_only=True)
class CacheScore:
    """What a cache policy scores an expert by.

    `frequency` counts uses, each worth half as much after `half_life` tokens (None: for ever).
    `profile` ranks by given counts instead: the best are loaded before the first token, and an
    expert enters only by outranking one inside. `future` knows the trace: "window" counts the uses
    in the `window` tokens from the current one, "next use" is Belady's optimum.
    """

    frequency: bool = False
    half_life: float | None = None
    profile: bool = False
    future: Future = "none"
    window: int = 0

    def __post_init__(self) -> None:
        if self.half_life is not None and not self.half_life > 0:
            raise UserError(f"half_life is {self.half_life} tokens; it must be above 0")
        if (self.future == "window") != (self.window > 0):
            raise UserError(f"future {self.future!r} does not go with a window of {self.window}")
        if self.profile + self.frequency + (self.future != "none") > 1:
            raise UserError("a cache score is by frequency, by profile or by future: choose one")


class ScoreState:
    """The scores of the experts of N streams, updated by every use; for scores without future.

    `profile` [N, E] is needed by a score that has one.
    """

    def __init__(
        self,
        score: CacheScore,
        num_streams: int,
        num_experts: int,
        profile: NDArray[np.float64] | None = None,
    ):
        if score.profile and profile is None:
            raise UserError("a static hot set needs a profile: counts by layer and expert")
        self.score = score
        self._profile = profile
        self._mass = np.full((num_streams, num_experts + 1), -np.inf if score.half_life else 0.0)
        self._rows = np.arange(num_streams)[:, None]
        self._clock = 0

    def use(self, step: int, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        """The scores [N, K] after token `step` used the experts ids [N, K] in this order.

        The ids of one row differ, except that unused places hold the number of experts.
        """
        width = ids.shape[1]
        clock = self._clock + np.arange(width)
        self._clock += width
        if self._profile is not None:
            return self._profile[self._rows, np.minimum(ids, self._profile.shape[1] - 1)]
        if not self.score.frequency:
            return np.broadcast_to(clock.astype(np.float64), ids.shape)
        mass = self._mass[self._rows, ids]
        if self.score.half_life:
            # Growing the new instead of shrinking the old keeps untouched scores comparable; the
            # logarithm keeps them finite.
            mass = np.logaddexp(mass, step * math.log(2) / self.score.half_life)
            self._mass[self._rows, ids] = mass
            return mass
        self._mass[self._rows, ids] = mass + 1
        return (mass + 1) * CLOCK + clock


def policy(name: str) -> CacheScore:
    """The score of a registered cache policy; UserError with the nearest names if there is none."""
    return registry.find(name, kind="policy").load()()


register_preset(
    CacheScore,
    "lru",
    kind="policy",
    title="Evict the least recently used expert",
    needs=("trace",),
    lossless=True,
    settings={},
)
register_preset(
    CacheScore,
    "lfu",
    kind="policy",
    title="Evict the least frequently used expert",
    needs=("trace",),
    lossless=True,
    settings={"frequency": True},
)
register_preset(
    CacheScore,
    "lfu-aged",
    kind="policy",
    title="Evict the least frequently used expert, uses halving in worth every 128 tokens",
    needs=("trace",),
    lossless=True,
    settings={"frequency": True, "half_life": 128.0},
)
register_preset(
    CacheScore,
    "hot-set",
    kind="policy",
    title="Keep the experts that a profile used most; the rest pass through",
    needs=("trace",),
    lossless=True,
    limits="As good as the profile resembles the traffic.",
    settings={"profile": True},
)
register_preset(
    CacheScore,
    "belady",
    kind="policy",
    title="Belady's optimum: evict the expert whose next use is furthest",
    needs=("trace",),
    lossless=True,
    limits="Knows the future: for simulation only.",
    settings={"future": "next use"},
)
