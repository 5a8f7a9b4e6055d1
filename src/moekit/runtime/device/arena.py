"""Slots in one piece of memory that is all there from the beginning, on a GPU or pinned in RAM."""

from __future__ import annotations

from torch import Tensor

from moekit.runtime.slots import Slot


class Arena:
    """Slots out of the bytes `start` to `stop` of `memory`, the first that fit.

    `held` is the bytes of the slots in use. Records of one size never leave a gap that is too
    small; among several sizes a slot may need more evictions than its bytes.
    """

    def __init__(self, memory: Tensor, start: int, stop: int) -> None:
        self.memory = memory
        self.limit, self.held = stop - start, 0
        self._base = memory.data_ptr()
        # Free spans (begin, end) in their order; no two touch.
        self._free = [(start, stop)] if stop > start else []

    def take(self, size: int) -> Slot | None:
        """A slot of `size` bytes, or None where no free span is as large."""
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                left = [(begin + size, end)] if end - begin > size else []
                self._free[place : place + 1] = left
                self.held += size
                return Slot(self, begin, size, self._base + begin)
        return None

    def give(self, slot: Slot) -> None:
        """Take back a slot whose record is no longer needed."""
        begin, end = slot.offset, slot.offset + slot.size
        self.held -= slot.size
        place = next((i for i, span in enumerate(self._free) if span[0] > begin), len(self._free))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == begin:
            begin = self._free.pop(place - 1)[0]
            place -= 1
        self._free.insert(place, (begin, end))


class Arenas:
    """Makes the slots of the pools of a `Residency` out of one memory, one after the other."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._used = 0

    def __call__(self, limit: int, records: object) -> Arena:
        start = self._used
        self._used = start + limit
        return Arena(self.memory, start, self._used)
