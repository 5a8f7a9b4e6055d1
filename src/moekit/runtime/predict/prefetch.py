"""Which predicted experts are worth reading now.

A read that turns out right saves the time that the layer would have waited for it; one that turns
out wrong takes the disk from a demand read that may come before it is done. An expert is read when
the first, times its probability, outweighs the second, and while the bytes expected to be wasted
stay below a share of those that are needed anyway.

Shapes: T tokens, D width, K chosen, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.runtime.predict.calibration import Bins, Calibration, bins_of
from moekit.runtime.predict.predictor import REACH, Predictor

# Seconds that a wasted read of one second costs even where nobody waits for it: it takes a slot.
SLOT_PRICE = 0.3
# The chance from which an expert that is in memory is named too, to be kept there. It is learned
# from those that were not in memory, which are used less often.
KEEP = 0.05
# Passes without anything worth a hint after which only one in so many is predicted: asking a
# predictor takes time, and what cannot be predicted now may be later.
PATIENCE = 16
# Weight of the last layer in the running mean of idle time.
NEWEST = 0.02


@dataclass(frozen=True)
class Hint:
    """Experts for `layer`: those in memory to keep, then those to read, likeliest first.

    Takes the place of the layer's hint before.
    """

    layer: int
    ids: list[int]


@dataclass
class PrefetchStats:
    """Bytes that hints brought and that were used, or were not, and bytes read on demand."""

    useful: int = 0
    wasted: int = 0
    demanded: int = 0


@dataclass
class _Plan:
    """What is expected of a layer: by layers ahead the scores (their bins) of the experts that
    were absent, and who those were; and the chance of each expert that is or was hinted."""

    expected: list[tuple[int, Bins, NDArray[np.bool_]]] = field(default_factory=list)
    hinted: dict[int, float] = field(default_factory=dict)


class Prefetcher:
    """Turns predictions into hints for an expert cache.

    `expert_bytes` [L] is what a read of one expert takes, `bandwidth` bytes a second of the disk,
    `layer_seconds` the time a layer computes, in which the disk would idle (both may be set again
    while it runs). Reads ahead that turn out wrong stay below `waste_limit` of the bytes needed, in
    expectation, and what is hinted after one layer below `budget` bytes. What they evict is read
    again on top of that, so a limit of 0.15 keeps all bytes below 1.3 of those without prefetch.
    A predictor that knows nothing is asked less often.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        num_experts: int,
        top_k: int,
        expert_bytes: Sequence[int],
        bandwidth: float,
        layer_seconds: float,
        waste_limit: float = 0.15,
        budget: int | None = None,
        reach: int = REACH,
    ) -> None:
        if bandwidth <= 0 or layer_seconds < 0 or waste_limit < 0:
            raise UserError(
                f"bandwidth {bandwidth}, layer_seconds {layer_seconds} and waste_limit "
                f"{waste_limit} must not be negative, the first not zero"
            )
        self.predictor, self.stats = predictor, PrefetchStats()
        self.bandwidth, self.layer_seconds = bandwidth, layer_seconds
        self.waste_limit, self.budget, self.reach = waste_limit, budget, min(reach, REACH)
        self._bytes, self._experts, self._top_k = list(expert_bytes), num_experts, top_k
        self._calibration = Calibration(len(self._bytes), top_k / num_experts)
        # Hinted in vain and not there when their layer came: read after all, or dropped.
        self._late: dict[int, list[int]] = {}
        # Running mean of the part of a layer's time in which it leaves the disk idle.
        self._idle_part = 1.0
        # Passes so far, and since one brought something.
        self._passes = self._idle = 0
        self.start()

    def start(self) -> None:
        """A new text begins; what was learned about the predictor stays."""
        self.predictor.start(len(self._bytes), self._experts, self._top_k)
        self._plans: dict[int, _Plan] = {}

    def begin(self, tokens: ArrayLike | None, resident: NDArray) -> list[Hint]:
        """A forward pass over tokens [T] begins; `resident` [L, E] is true (or an address) where
        an expert is in memory."""
        self._plans = {}
        self._passes += 1
        self._idle += 1
        self.predictor.begin(tokens)
        return self._hints(-1, self.layer_seconds, resident)

    def observe(
        self, layer: int, ids: ArrayLike, hidden: ArrayLike | None, resident: NDArray
    ) -> list[Hint]:
        """The router of `layer` chose ids [T, K] on `hidden` [T, D]: hints for the next layers.

        Call it before the cache takes up the layer, so that `resident` tells what hints brought.
        """
        self.predictor.observe(layer, ids, hidden)
        missing = self._settle(layer, np.asarray(ids), resident[layer] != 0)
        busy = missing * self._bytes[layer] / self.bandwidth
        idle = max(0.0, self.layer_seconds - busy)
        if self.layer_seconds > 0:
            self._idle_part += NEWEST * (idle / self.layer_seconds - self._idle_part)
        return self._hints(layer, idle, resident)

    def _settle(self, layer: int, ids: NDArray, resident: NDArray[np.bool_]) -> int:
        """Compare what was expected of a layer with what it used; return how many are missing."""
        plan = self._plans.pop(layer, _Plan())
        used = np.zeros(self._experts, dtype=bool)
        used[ids[ids >= 0]] = True
        for ahead, bins, absent in plan.expected:
            self._calibration.learn(layer, ahead, bins, used[absent])
        size = self._bytes[layer]
        missing = int((used & ~resident).sum())
        self.stats.demanded += size * missing
        for expert in (*plan.hinted, *self._late.pop(layer, ())):
            if resident[expert] and used[expert]:
                self.stats.useful += size
            elif resident[expert]:
                self.stats.wasted += size
        self._late[layer] = [e for e in plan.hinted if not (resident[e] or used[e])]
        return missing

    def _hints(self, layer: int, idle: float, resident: NDArray) -> list[Hint]:
        """Hints after `layer`, which itself leaves the disk `idle` for seconds."""
        if self._idle > PATIENCE and self._passes % PATIENCE:
            return []
        hints, issued, waiting = [], 0, 0.0
        for ahead in range(1, min(self.reach, len(self._bytes) - 1 - layer) + 1):
            target = layer + ahead
            plan = self._plans.setdefault(target, _Plan())
            absent = resident[target] == 0
            if not absent.any():
                continue
            scores = self.predictor.predict(layer, ahead)
            bins = bins_of(scores)
            plan.expected.append((ahead, bins[absent], absent))
            chance = self._calibration.probability(target, ahead, bins)
            size = self._bytes[target]
            seconds = size / self.bandwidth
            chosen = np.flatnonzero(~absent & (chance >= KEEP)).tolist()
            for expert in np.lexsort((-scores, -chance)):
                p = float(chance[expert])
                # The layers between want the disk too, as often as layers did of late.
                slack = idle + (ahead - 1) * self._idle_part * self.layer_seconds - waiting
                full = self.budget is not None and issued + size > self.budget
                if full or not self._pays(p, seconds, slack):
                    break
                if not absent[expert]:
                    continue
                open_before = plan.hinted.get(int(expert))
                if open_before is None and not self._affords((1 - p) * size):
                    break
                plan.hinted[int(expert)] = p
                chosen.append(int(expert))
                issued += size
                waiting += seconds
            hints.append(Hint(target, chosen))
            # Experts in memory are worth naming where some are more likely than any other.
            if issued or np.max(chance[~absent], initial=0.0) > 2 * self._top_k / self._experts:
                self._idle = 0
        return hints

    @staticmethod
    def _pays(p: float, seconds: float, slack: float) -> bool:
        """Whether reading for `seconds`, with `slack` until the layer begins, saves time."""
        saved = min(max(slack, 0.0), seconds)
        return p * saved > (1 - p) * (seconds - saved + SLOT_PRICE * seconds)

    def _affords(self, expected_waste: float) -> bool:
        pending = sum(
            (1 - p) * self._bytes[target]
            for target, plan in self._plans.items()
            for p in plan.hinted.values()
        )
        needed = self.stats.demanded + self.stats.useful
        return self.stats.wasted + pending + expected_waste <= self.waste_limit * needed
