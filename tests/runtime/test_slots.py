"""Slots: pages taken are never more than the limit, measured by the kernel's own count."""

import ctypes
import itertools
import random

import pytest

from moekit.core.packed import PAGE
from moekit.runtime.slots import SlotMemory


def resident_pages(memory):
    """Pages of the slabs that are in memory, asked of mincore."""
    libc, pages = ctypes.CDLL(None, use_errno=True), 0
    for slab in memory._slabs.values():
        count = len(slab.memory) // PAGE
        flags = (ctypes.c_ubyte * count)()
        address = ctypes.c_void_p(slab.memory.data_ptr())
        assert libc.mincore(address, ctypes.c_size_t(len(slab.memory)), flags) == 0
        pages += sum(flag & 1 for flag in flags)
    return pages


@pytest.mark.parametrize("seed", range(3))
def test_sizes_in_turn_take_no_more_than_the_limit(seed):
    rng = random.Random(seed)
    memory, held = SlotMemory(40 * PAGE, {PAGE: 60, 3 * PAGE: 20, 8 * PAGE: 4}), []
    refused = 0
    for step in range(400):
        size = rng.choice([1, 3, 8]) * PAGE
        slot = memory.take(size)
        if slot is None:
            refused += 1
            for _ in range(min(len(held), 3)):
                memory.give(held.pop(rng.randrange(len(held))))
        else:
            assert (slot.size, slot.address % PAGE) == (size, 0)
            slot.view()[:] = step % 256
            held.append(slot)
        assert sum(slot.size for slot in held) <= memory.held <= 40 * PAGE
        assert resident_pages(memory) * PAGE == memory.held
    assert refused > 20
    spans = sorted((slot.address, slot.address + slot.size) for slot in held)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_a_slot_of_the_same_size_is_used_again():
    memory = SlotMemory(2 * PAGE, {PAGE: 5})
    first, second = memory.take(PAGE), memory.take(PAGE)
    assert memory.take(PAGE) is None
    assert memory.take(2 * PAGE) is None
    memory.give(first)
    assert memory.take(PAGE) is first
    assert second.address != first.address


def test_memory_outlives_its_owner_while_it_is_seen():
    memory = SlotMemory(PAGE, {PAGE: 1})
    view = memory.take(PAGE).view()
    del memory
    view[:] = 7
    assert int(view.sum()) == 7 * PAGE
