"""The k-th largest magnitude of a tensor that is read in blocks, exact, without sorting.

Magnitudes of floats order like their bit patterns without the sign, so a selection on integers
finds the threshold; entries equal to it are kept first come, first served, so that exactly k stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Blocks = Callable[[], Iterator[Tensor]]
# Up to here bit patterns are held and selected among, which is faster than counting them.
SORTED_ENTRIES = 2**27
HALF = 16

# Integer types that hold the bits of a float, and the mask that takes its sign away.
_BITS = {2: (torch.int16, np.uint16, 0x7FFF), 4: (torch.int32, np.uint32, 0x7FFFFFFF)}


def magnitude_bits(values: Tensor) -> np.ndarray:
    """The bit patterns of |values|, flat: uint16 for 16-bit floats, uint32 for 32-bit ones."""
    signed, unsigned, mask = _BITS[values.dtype.itemsize]
    return values.contiguous().view(signed).numpy().view(unsigned).reshape(-1) & unsigned(mask)


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is true, else 0; many times as fast as `torch.where` on a CPU."""
    signed, unsigned, _ = _BITS[values.dtype.itemsize]
    bits = values.contiguous().view(signed).numpy().view(unsigned)
    return torch.from_numpy((bits * mask.numpy()).view(bits.dtype)).view(values.dtype)


@dataclass
class Largest:
    """Keeps the entries with bits above `threshold`, and the first `ties` of those equal to it."""

    threshold: int
    ties: int
    total_ties: int

    def __post_init__(self) -> None:
        self._taken = 0

    def keep(self, values: Tensor) -> Tensor:
        """Mask of the entries of the next block that stay; blocks come in order."""
        bits = magnitude_bits(values)
        if self.ties == self.total_ties:
            kept = bits >= self.threshold
        else:
            kept = bits > self.threshold
            equal = np.flatnonzero(bits == self.threshold)
            room = equal[: self.ties - self._taken]
            kept[room] = True
            self._taken += len(room)
        return torch.from_numpy(kept).view(values.shape)


def largest(blocks: Blocks, count: int, entries: int) -> Largest:
    """Selection of the `count` largest magnitudes of all `entries`; NaN counts as large.

    `count` is at least 1 and at most the number of entries. Memory: one integer for each entry, or
    for more than `SORTED_ENTRIES` a table of counts, which takes longer.
    """
    if entries > SORTED_ENTRIES:
        threshold, below, equal = nth_bits(blocks, entries - count + 1)
        return Largest(threshold, count - (entries - below - equal), equal)
    bits = np.empty(0)
    filled = 0
    for block in blocks():
        part = magnitude_bits(block)
        if not filled:
            bits = np.empty(entries, dtype=part.dtype)
        bits[filled : filled + len(part)] = part
        filled += len(part)
    place = entries - count
    bits.partition(place)
    threshold = int(bits[place])
    # Behind the place are the larger ones and some equal; before it the smaller and the rest.
    above = int(np.count_nonzero(bits[place:] > threshold))
    equal = int(np.count_nonzero(bits == threshold))
    return Largest(threshold, count - above, equal)


def nth_bits(blocks: Blocks, place: int) -> tuple[int, int, int]:
    """The bits of the magnitude at `place` (from 1, ascending), how many lie below it, and how many
    equal it.

    In constant memory, from counts of bit patterns: one pass for 16-bit floats, two for 32-bit.
    """
    width = next(blocks()).dtype.itemsize * 8

    def counted(index: Callable[[np.ndarray], np.ndarray], place: int) -> tuple[int, int, int]:
        counts = np.zeros(1 << HALF, dtype=np.int64)
        for block in blocks():
            found = index(magnitude_bits(block)).astype(np.int64)
            counts += np.bincount(found, minlength=1 << HALF)
        reached = np.cumsum(counts)
        bin_ = int(np.searchsorted(reached, place))
        return bin_, int(reached[bin_] - counts[bin_]), int(counts[bin_])

    high, below, equal = counted(lambda bits: bits >> (width - HALF), place)
    if width == HALF:
        return high, below, equal
    low, lower, equal = counted(lambda bits: bits[bits >> HALF == high] & 0xFFFF, place - below)
    return (high << HALF) | low, below + lower, equal
