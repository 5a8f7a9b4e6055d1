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
from moekit.runtime.predict.calibration import UNKNOWN, Bins, Calibration, bins_of
from moekit.runtime.predict.predictor import REACH, Predictor, Scores

# Seconds that a wasted read of one second costs even where nobody waits for it: it takes a slot.
SLOT_PRICE = 0.3
# The chance from which an expert that is in memory is named too, to be kept there. It is learned
# from those that were not in memory, which are used less often.
KEEP = 0.05
# The share of the time of reading that naming them saves, in virtual time on babel.
KEEPING_SAVES = 0.02
# The share of a pass's time below which what is saved counts as nothing.
LEAST_GAIN = 0.01
# Passes without gain after which only one in so many is predicted: asking a predictor takes time,
# and what cannot be predicted now may be later.
PATIENCE = 16
# Weight of the last layer in the running mean of idle time, and of the last pass in that of gain.
NEWEST, NEWEST_PASS = 0.02, 0.25


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
    """What is expected of a layer: by layers ahead, the bins of the scores of the experts that were
    absent [REACH, E], below 0 for the others; and the chance of each expert that is or was
    hinted."""

    expected: Bins | None = None
    hinted: dict[int, float] = field(default_factory=dict)


@dataclass
class _Spent:
    """What the hints after one layer ask for: bytes, and seconds of the disk; and the seconds that
    those of them that are new are expected to save."""

    nbytes: int = 0
    seconds: float = 0.0
    gain: float = 0.0


class Prefetcher:
    """Turns predictions into hints for an expert cache.

    `expert_bytes` [L] is what a read of one expert takes, `bandwidth` bytes a second of the disk,
    `layer_seconds` the time a layer computes, in which the disk would idle (both may be set again
    while it runs). `prediction_seconds` is what predicting costs a pass, 0 until it is set. Reads
    ahead that turn out wrong stay below `waste_limit` of the bytes needed, in expectation, and what
    is hinted after one layer below `budget` bytes. What they evict is read again on top of that, so
    a limit of 0.15 keeps all bytes below 1.3 of those without prefetch. Where predicting does not
    gain more than it costs, most passes are `resting`.
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
        self.prediction_seconds = 0.0
        self.resting = False
        # Passes so far, and since predicting gained something.
        self._passes = self._idle = 0
        # Seconds that the hints of this pass are expected to save, and their running mean; seconds
        # of reading on demand, and whether experts in memory were worth naming.
        self._gain = self._mean_gain = self._reading = 0.0
        self._kept = False
        # The last layer settled, how many of its experts are missing, and the seconds for which it
        # leaves the disk idle.
        self._at, self.missing, self._slack = -1, 0, 0.0
        self.start()

    def start(self) -> None:
        """A new text begins; what was learned about the predictor stays."""
        self.predictor.start(len(self._bytes), self._experts, self._top_k)
        self._plans: dict[int, _Plan] = {}

    def begin(self, tokens: ArrayLike | None, resident: NDArray) -> list[Hint]:
        """A forward pass over tokens [T] begins; `resident` [L, E] is true (or an address) where
        an expert is in memory."""
        self.start_pass(tokens)
        return self.hints(resident)

    def observe(
        self, layer: int, ids: ArrayLike, hidden: ArrayLike | None, resident: NDArray
    ) -> list[Hint]:
        """The router of `layer` chose ids [T, K] on `hidden` [T, D]: hints for the next layers.

        Call it before the cache takes up the layer, so that `resident` tells what hints brought.
        """
        self.settle(layer, ids, hidden, resident)
        return self.hints(resident)

    def start_pass(self, tokens: ArrayLike | None) -> None:
        """The first half of `begin`: what was expected of the pass before is forgotten."""
        self._plans = {}
        if self._passes and not self.resting:
            gain = self._gain + (KEEPING_SAVES * self._reading if self._kept else 0.0)
            self._mean_gain += NEWEST_PASS * (gain - self._mean_gain)
            seconds = len(self._bytes) * self.layer_seconds + self._reading
            if self._mean_gain > max(self.prediction_seconds, LEAST_GAIN * seconds):
                self._idle = 0
        self._gain = self._reading = 0.0
        self._kept = False
        self._passes += 1
        self._idle += 1
        self.resting = self._idle > PATIENCE and self._passes % PATIENCE > 0
        self._at, self._slack = -1, self.layer_seconds
        self.predictor.begin(tokens)

    def settle(
        self, layer: int, ids: ArrayLike, hidden: ArrayLike | None, resident: NDArray
    ) -> None:
        """The first half of `observe`: compare what was expected of a layer with what it uses."""
        self.predictor.observe(layer, ids, hidden)
        here, numbers = resident[layer] != 0, np.asarray(ids)
        plan = self._plans.pop(layer, _Plan())
        used = np.zeros(self._experts, dtype=bool)
        used[numbers[numbers >= 0]] = True
        if plan.expected is not None:
            self._calibration.learn(layer, plan.expected, used)
        size = self._bytes[layer]
        self.missing = int(np.count_nonzero(used & ~here))
        self.stats.demanded += size * self.missing
        for expert in (*plan.hinted, *self._late.pop(layer, ())):
            if here[expert] and used[expert]:
                self.stats.useful += size
            elif here[expert]:
                self.stats.wasted += size
        self._late[layer] = [e for e in plan.hinted if not (here[e] or used[e])]
        self._at = layer
        reading = self.missing * size / self.bandwidth
        self._reading += reading
        self._slack = max(0.0, self.layer_seconds - reading)
        if self.layer_seconds > 0:
            self._idle_part += NEWEST * (self._slack / self.layer_seconds - self._idle_part)

    def hints(self, resident: NDArray) -> list[Hint]:
        """The second half of `begin` and of `observe`, for the layers after the last one settled;
        it may come while that layer's experts are read."""
        count = min(self.reach, len(self._bytes) - 1 - self._at)
        if count < 1 or self.resting:
            return []
        next_ones = resident[self._at + 1 : self._at + 1 + count] == 0
        # A layer of which everything is in memory needs no prediction.
        aheads = (np.flatnonzero(next_ones.any(axis=1)) + 1).tolist()
        if not aheads:
            return []
        absent = next_ones[[ahead - 1 for ahead in aheads]]
        scores = self.predictor.predict_all(self._at, aheads)
        bins = bins_of(scores)
        chances = self._calibration.probabilities(self._at, aheads, bins)
        expected = np.where(absent, bins, UNKNOWN)
        kept = np.where(absent, 0.0, chances)
        # Worth it where some are more likely than any other.
        self._kept = self._kept or bool(kept.max() > 2 * self._top_k / self._experts)
        found: list[Hint] = []
        spent = _Spent()
        for row, ahead in enumerate(aheads):
            plan = self._plans.setdefault(self._at + ahead, _Plan())
            if plan.expected is None:
                plan.expected = np.full((REACH, self._experts), UNKNOWN)
            plan.expected[ahead - 1] = expected[row]
            chosen = np.flatnonzero(kept[row] >= KEEP).tolist()
            read = self._worth_reading(ahead, plan, scores[row], chances[row], absent[row], spent)
            found.append(Hint(self._at + ahead, [*chosen, *read]))
        self._gain += spent.gain
        return found

    def _worth_reading(
        self,
        ahead: int,
        plan: _Plan,
        scores: Scores,
        chances: NDArray[np.float64],
        absent: NDArray[np.bool_],
        spent: _Spent,
    ) -> list[int]:
        """The absent experts of the layer `ahead` that are to be read now, likeliest first; what
        they take is added to `spent`."""
        size = self._bytes[self._at + ahead]
        seconds = size / self.bandwidth
        # The layers between want the disk too, as often as layers did of late.
        until = self._slack + (ahead - 1) * self._idle_part * self.layer_seconds
        best = float(np.where(absent, chances, 0.0).max())
        if _gain(best, seconds, until - spent.seconds) <= 0:
            return []
        chosen: list[int] = []
        candidates = np.flatnonzero(absent)
        for expert in candidates[np.lexsort((-scores[absent], -chances[absent]))].tolist():
            p = float(chances[expert])
            full = self.budget is not None and spent.nbytes + size > self.budget
            gain = _gain(p, seconds, until - spent.seconds)
            if full or gain <= 0:
                break
            if expert not in plan.hinted:
                if not self._affords((1 - p) * size):
                    break
                spent.gain += gain
            plan.hinted[expert] = p
            chosen.append(expert)
            spent.nbytes += size
            spent.seconds += seconds
        return chosen

    def _affords(self, expected_waste: float) -> bool:
        pending = sum(
            (1 - p) * self._bytes[target]
            for target, plan in self._plans.items()
            for p in plan.hinted.values()
        )
        needed = self.stats.demanded + self.stats.useful
        return self.stats.wasted + pending + expected_waste <= self.waste_limit * needed


def _gain(p: float, seconds: float, slack: float) -> float:
    """The seconds that reading for `seconds` what is used with chance `p` saves, the layer being
    `slack` away; below 0 where it may be expected to cost more."""
    saved = min(max(slack, 0.0), seconds)
    return p * saved - (1 - p) * (seconds - saved + SLOT_PRICE * seconds)
