"""Memory for expert records: slots of a few sizes, never more bytes together than a limit."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moekit.core.errors import UserError

# Not in the standard library before Python 3.13, and the same number on every Linux.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Holder(Protocol):
    """What slots are parts of."""

    memory: Tensor


@dataclass(eq=False, slots=True)
class Slot:
    """Room for one record: bytes [size] from `address` on, a multiple of the page size."""

    slab: Holder
    offset: int
    size: int
    address: int

    def view(self) -> Tensor:
        """The memory itself, bytes [size]."""
        return self.slab.memory[self.offset : self.offset + self.size]


class Slots(Protocol):
    """Gives out slots of at most `limit` bytes together, of which it holds `held`."""

    limit: int
    held: int

    def take(self, size: int) -> Slot | None:
        """A slot for a record of `size` bytes, or None while there is no room."""

    def give(self, slot: Slot) -> None:
        """Take back a slot whose record is no longer needed."""


class SlotMemory:
    """Slots out of at most `limit` bytes of memory of its own.

    `records` maps each size in bytes (a multiple of the page) to how many records there are of it.
    Address space is reserved for all sizes, but a page takes memory only once it is written to:
    `held` is the bytes of the slots written to or about to be, and stays within `limit`. A slot
    that is given back keeps its pages for the next record of its size; when another size needs the
    room, they go back to the system.
    """

    def __init__(self, limit: int, records: Mapping[int, int]) -> None:
        self.limit, self.held = limit, 0
        self._slabs = {
            size: _Slab(size, min(count, limit // size), huge=len(records) == 1)
            for size, count in records.items()
            if limit >= size
        }

    def take(self, size: int) -> Slot | None:
        """A slot for a record of `size` bytes, or None where it would take more than `limit`."""
        slab = self._slabs.get(size)
        if slab is None:
            return None
        if slab.kept:
            return slab.kept.pop()
        if self.held + size > self.limit:
            self._shed(self.held + size - self.limit)
        if self.held + size > self.limit or not slab.fresh:
            return None
        self.held += size
        return slab.fresh.pop()

    def give(self, slot: Slot) -> None:
        """Take back a slot whose record is no longer needed."""
        assert isinstance(slot.slab, _Slab)
        slot.slab.kept.append(slot)

    def _shed(self, needed: int) -> None:
        """Give pages of kept slots back to the system until `needed` bytes are free."""
        for slab in self._slabs.values():
            while needed > 0 and slab.kept:
                slot = slab.kept.pop()
                slab.map.madvise(mmap.MADV_DONTNEED, slot.offset, slot.size)
                slab.fresh.append(slot)
                self.held -= slot.size
                needed -= slot.size


class _Slab:
    """`count` slots of one size in one piece of address space.

    `fresh` have no pages, `kept` have pages that nobody needs.
    """

    def __init__(self, size: int, count: int, *, huge: bool) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self.map = mmap.mmap(-1, size * count, flags=flags)
        except OSError as error:
            raise UserError(
                f"{size * count} bytes for the expert cache cannot be reserved: {error.strerror}. "
                "Give it less memory."
            ) from None
        # A huge page reaches over the end of a slot: no matter where all slots are of one size.
        self.map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self.memory = torch.frombuffer(self.map, dtype=torch.uint8)
        base = self.memory.data_ptr()
        offsets = range(size * (count - 1), -1, -size)
        self.fresh = [Slot(self, offset, size, base + offset) for offset in offsets]
        self.kept: list[Slot] = []
