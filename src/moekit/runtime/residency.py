"""Who stays in memory: the pools of an expert cache and the choice of whom to evict.

An expert has one number over all layers, layer * E + expert. Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.core.cache_score import CacheScore, ScoreState
from moekit.core.errors import UserError
from moekit.runtime.slots import Slot, SlotMemory, Slots
from moekit.runtime.store import ExpertStore

Numbers = NDArray[np.intp]
# (limit in bytes, how many records there are of each size) -> slots.
NewSlots = Callable[[int, Mapping[int, int]], Slots]


class Pool:
    """The layers `first` to `last` and the slots that their experts share."""

    def __init__(
        self,
        sizes: NDArray[np.int64],
        layers: range,
        limit: int,
        score: CacheScore,
        profile: NDArray[np.float64] | None,
        new_slots: NewSlots,
    ) -> None:
        experts = sizes.shape[1]
        self.layers = layers
        self.first = layers.start * experts
        self.last = layers.stop * experts
        own = sizes[layers.start : layers.stop]
        counted = Counter(own[own > 0].tolist())
        largest = max(counted)
        if limit < largest:
            of = "the layers" if len(layers) > 1 else f"layer {layers.start}"
            raise UserError(
                f"an expert of {of} takes {largest} bytes; the {limit} bytes of the expert cache "
                "for it hold none. Give it more memory."
            )
        self.memory = new_slots(limit, counted)
        ranks = None if profile is None else profile[layers.start : layers.stop].reshape(1, -1)
        self.scores = ScoreState(score, 1, self.last - self.first, ranks, layers=len(layers))


class Residency:
    """Which experts are in memory, and where.

    `sizes` [L, E] are the bytes of the records, 0 where a layer has no such expert. With
    `per_layer` every layer has its share of the `nbytes` for itself, in proportion to the bytes of
    its experts; `new_slots` makes the memory of each share. `table` [L * E] holds the address of a
    record or 0. `pins` counts who computes with an expert; it is not evicted before that is 0.
    `guarded` ones are wanted soon, and go last.
    """

    def __init__(
        self,
        sizes: NDArray[np.int64],
        nbytes: int,
        score: CacheScore,
        *,
        per_layer: bool = False,
        profile: NDArray[np.float64] | None = None,
        new_slots: NewSlots = SlotMemory,
    ) -> None:
        count, self.experts = sizes.shape
        self.sizes = sizes.reshape(-1)
        total = int(sizes.sum())
        parts = [range(layer, layer + 1) for layer in range(count)] if per_layer else [range(count)]
        self.pools = []
        for part in parts:
            share = nbytes if len(parts) == 1 else nbytes * int(sizes[part].sum()) // total
            self.pools.append(Pool(sizes, part, share, score, profile, new_slots))
        self._pool_of = [pool for pool in self.pools for _ in pool.layers]
        self.table = np.zeros(count * self.experts, dtype=np.uint64)
        self.pins = np.zeros(count * self.experts, dtype=np.int32)
        self.guarded = np.zeros(count * self.experts, dtype=bool)
        self._inside = np.zeros(count * self.experts, dtype=bool)
        self._slots: dict[int, Slot] = {}
        self._time = [0] * count

    @property
    def held(self) -> int:
        """Bytes of the slots that have or get pages."""
        return sum(pool.memory.held for pool in self.pools)

    @property
    def count(self) -> int:
        """How many experts are inside."""
        return len(self._slots)

    def pool(self, layer: int) -> Pool:
        return self._pool_of[layer]

    def use(
        self,
        layer: int,
        numbers: Numbers,
        tokens: int = 1,
        counts: NDArray[np.floating] | None = None,
        gains: tuple[Numbers, NDArray[np.floating]] | None = None,
    ) -> None:
        """Score the use of experts, all different, by the next `tokens` tokens of a layer."""
        pool = self._pool_of[layer]
        own = (numbers - pool.first)[None]
        if gains is not None:
            gains = ((gains[0] + (layer * self.experts - pool.first))[None], gains[1][None])
        served = pool.scores.use(
            self._time[layer], own, counts=None if counts is None else counts[None], gains=gains
        )
        pool.scores.keys[0, own[0]] = served[0]
        self._time[layer] += tokens

    def victims(self, layer: int, now: int | None = None, *, guarded: bool = True) -> Iterator[int]:
        """Experts to evict from the pool of `layer` while layer `now` is served (None: the same),
        lowest score first.

        Guarded ones come after all others, and only where `guarded`.
        """
        pool = self._pool_of[layer]
        part = slice(pool.first, pool.last)
        now = layer if now is None else now
        place = now - pool.layers.start if now in pool.layers else 0
        scores = pool.scores.present(place)[0, :-1]
        free = self._inside[part] & (self.pins[part] == 0)
        wanted = self.guarded[part]
        for group in (free & ~wanted, free & wanted) if guarded else (free & ~wanted,):
            compared = np.where(group, scores, np.inf)
            while True:
                lowest = int(compared.argmin())
                if compared[lowest] == np.inf:
                    break
                compared[lowest] = np.inf
                yield lowest + pool.first

    def best(self, ranks: NDArray[np.float64]) -> Sequence[int]:
        """The experts of the highest `ranks` [L, E] that fit together."""
        flat, chosen = ranks.reshape(-1), []
        for pool in self.pools:
            room = pool.memory.limit
            own = flat[pool.first : pool.last]
            for number in (np.argsort(-own, kind="stable") + pool.first).tolist():
                size = int(self.sizes[number])
                if 0 < size <= room:
                    chosen.append(number)
                    room -= size
        return chosen

    def place(self, number: int, slot: Slot) -> None:
        """The record of an expert is in `slot`."""
        self._slots[number] = slot
        self._inside[number] = True
        self.table[number] = slot.address

    def evict(self, number: int) -> None:
        """Take an expert out; its slot is free."""
        self.table[number] = 0
        self._inside[number] = False
        self._pool_of[number // self.experts].memory.give(self._slots.pop(number))

    def slot(self, number: int) -> Slot:
        """Where an expert is; KeyError if it is not in memory."""
        return self._slots[number]

    def clear(self) -> None:
        """Give up all memory that nobody has a view of."""
        self.table[:] = 0
        self._inside[:] = False
        self._slots.clear()
        for pool in self.pools:
            pool.memory = SlotMemory(0, {})


def record_sizes(store: ExpertStore) -> NDArray[np.int64]:
    """Bytes of the record of every expert [L, E], 0 where a layer has fewer."""
    sizes = np.zeros((len(store.layers), max(x.num_experts for x in store.layers)), dtype=np.int64)
    for layer, described in enumerate(store.layers):
        for expert in range(described.num_experts):
            sizes[layer, expert] = store.nbytes(layer, expert)
    return sizes
