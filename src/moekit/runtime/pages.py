"""Memory in whole pages, given back to the system when the last tensor in it is forgotten."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def page_aligned(size: int, *, huge: bool = False) -> Tensor:
    """Bytes [size] that begin at a page, as direct reads need; zero, and taken when written to.

    `huge` asks for huge pages: what is then read from end to end waits for few translations of
    addresses.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class Arena:
    """One piece of memory for many matrices, in huge pages where the system gives them."""

    ALIGN = 64

    def __init__(self, nbytes: int) -> None:
        self._memory = page_aligned(nbytes, huge=True)
        self._used = 0

    @classmethod
    def padded(cls, nbytes: int) -> int:
        """Bytes that `take(nbytes)` uses up."""
        return -(-nbytes // cls.ALIGN) * cls.ALIGN

    def take(self, nbytes: int) -> Tensor:
        """The next bytes [nbytes]."""
        start = self._used
        self._used += self.padded(nbytes)
        return self._memory[start : start + nbytes]
