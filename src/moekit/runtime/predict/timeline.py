"""A recorded run replayed in virtual time through a cache, a disk and a prefetcher.

One disk serves one read at a time and finishes what it began; demand reads go before prefetches. A
layer begins when its router has spoken, computes while its missing experts are read, and ends when
both are done. Who is evicted is decided by the code of the expert cache itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.core.cache_score import CacheScore
from moekit.core.errors import UserError
from moekit.core.packed import PAGE
from moekit.runtime.predict.prefetch import Hint, Prefetcher
from moekit.runtime.predict.recorded import Recording
from moekit.runtime.residency import Residency
from moekit.runtime.slots import Slot


@dataclass(frozen=True)
class Timeline:
    """Seconds of a run and of its computing alone, its accesses to experts, and the reads on demand
    and ahead."""

    seconds: float
    compute_seconds: float
    accesses: int
    demand_reads: int
    prefetch_reads: int

    @property
    def reads(self) -> int:
        return self.demand_reads + self.prefetch_reads


def play(
    recording: Recording,
    prefetcher: Prefetcher | None,
    *,
    slots: int,
    score: CacheScore,
    layer_seconds: float,
    read_seconds: float,
    batch: int = 1,
) -> Timeline:
    """Decode a recording through `slots` shared by all layers, from empty.

    `score` is a policy without profile and without knowledge of the future. Raises UserError for
    slots that cannot hold one layer's experts of a pass.
    """
    if score.profile or score.future != "none":
        raise UserError("a timeline needs a cache policy that learns from the past alone")
    run = _Run(recording, slots, score, read_seconds)
    accesses = passes = 0
    for fresh, rows in recording.passes(batch):
        if prefetcher is not None:
            if fresh:
                prefetcher.start()
            run.take(prefetcher.begin(recording.tokens[rows], run.resident))
        for layer, ids in enumerate(recording.ids):
            chosen = ids[rows]
            used = np.unique(chosen[chosen >= 0])
            if len(used) > slots:
                raise UserError(
                    f"{slots} slots cannot hold the {len(used)} experts that layer {layer} uses "
                    "at once"
                )
            accesses += len(used)
            if prefetcher is not None:
                hidden = None if recording.hidden is None else recording.hidden[layer][rows]
                run.take(prefetcher.observe(layer, chosen, hidden, run.resident))
            run.layer(layer, used, layer_seconds)
        passes += 1
    compute = passes * len(recording.ids) * layer_seconds
    return Timeline(run.now, compute, accesses, run.demand_reads, run.prefetch_reads)


class _Run:
    """The clock, the disk and the cache. An expert's number is layer * E + expert."""

    def __init__(
        self, recording: Recording, slots: int, score: CacheScore, read_seconds: float
    ) -> None:
        self.now = self.disk = 0.0
        self.demand_reads = self.prefetch_reads = 0
        self._read_seconds, self._experts = read_seconds, recording.num_experts
        # A page stands for an expert: nothing is ever written to it.
        sizes = np.full((len(recording.ids), recording.num_experts), PAGE)
        self._cache = Residency(sizes, slots * PAGE, score)
        self.resident = self._cache.table.reshape(sizes.shape)
        self._queue: dict[int, list[int]] = {}
        # What the disk is reading ahead, where to, and when it will be there.
        self._flying: tuple[int, Slot] | None = None
        self._landing = 0.0

    def take(self, hints: Sequence[Hint]) -> None:
        """New hints take the place of those of their layers."""
        for hint in hints:
            self._forget(hint.layer)
            self._queue[hint.layer] = [hint.layer * self._experts + e for e in hint.ids]
            self._cache.guarded[self._queue[hint.layer]] = True

    def layer(self, layer: int, used: NDArray[np.int64], compute: float) -> None:
        """Run one layer that uses the experts `used`."""
        numbers = layer * self._experts + used
        self._forget(layer)
        self._cache.use(layer, numbers)
        self._cache.pins[numbers] += 1
        arrival = self.now
        if self._flying is not None and self._flying[0] in numbers:
            arrival = max(arrival, self._landing)
            self._land()
        victims = self._cache.victims(layer)
        for number in numbers[self._cache.table[numbers] == 0].tolist():
            slot = self._room(number, victims)
            if slot is None:
                # Only what is on its way is in the way.
                self._land()
                slot = self._room(number, self._cache.victims(layer))
            assert slot is not None
            self._cache.place(number, slot)
            self.disk = arrival = max(self.disk, self.now) + self._read_seconds
            self.demand_reads += 1
        end = max(self.now + compute, arrival)
        self._cache.pins[numbers] -= 1
        self._read_ahead(layer, end)
        self.now = end

    def _read_ahead(self, layer: int, end: float) -> None:
        if self._flying is not None and self._landing <= end:
            self._land()
        for target in sorted(self._queue):
            waiting = self._queue[target]
            while waiting and self._flying is None and self.disk < end:
                number = waiting.pop(0)
                if self._cache.table[number]:
                    continue
                slot = self._room(number, self._cache.victims(layer, guarded=False))
                if slot is None:
                    return
                self._flying = number, slot
                self.disk = self._landing = max(self.disk, self.now) + self._read_seconds
                self.prefetch_reads += 1
                if self.disk <= end:
                    self._land()

    def _room(self, number: int, victims: Iterator[int]) -> Slot | None:
        memory = self._cache.pool(number // self._experts).memory
        while (slot := memory.take(PAGE)) is None:
            victim = next(victims, None)
            if victim is None:
                return None
            self._cache.evict(victim)
        return slot

    def _land(self) -> None:
        if self._flying is not None:
            self._cache.place(*self._flying)
            self._flying = None

    def _forget(self, layer: int) -> None:
        self._queue.pop(layer, None)
        first = layer * self._experts
        self._cache.guarded[first : first + self._experts] = False
