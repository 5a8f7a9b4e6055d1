"""How fast experts come from the disk, measured on some of them."""

from __future__ import annotations

import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moekit.runtime.expert_cache import READERS
from moekit.runtime.slots import SlotMemory
from moekit.runtime.store import ExpertStore

SECONDS = 0.25
PIECE = 2**22
# Experts that are asked for together at most, and the bytes they may take.
TOGETHER, BYTES = 8, 2**26


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second of several reads, and the seconds that a first one takes besides."""

    bandwidth: float
    latency: float = 0.0


def disk_speed(store: ExpertStore, seconds: float = SECONDS, *, nbytes: int = BYTES) -> DiskSpeed:
    """Read experts of `store` in random order as an expert cache does, for about `seconds`: into
    slots, whose large pages make a read up to twice as fast, by as many threads, checksums
    verified, one expert and several in turn. Holds `nbytes` bytes meanwhile, or one expert.

    Raises StoreError where one cannot be read.
    """
    order = [
        (layer, expert)
        for layer, described in enumerate(store.layers)
        for expert in range(described.num_experts)
    ]
    random.Random(0).shuffle(order)
    size = max(store.nbytes(layer, expert) for layer, expert in order)
    count = max(1, min(TOGETHER, len(order), nbytes // size))
    memory = SlotMemory(count * size, {size: count})
    taken = [memory.take(size) for _ in range(count)]
    # The first write to a page takes longer.
    slots = [slot.view().zero_() for slot in taken if slot is not None]
    mean = statistics.mean(store.nbytes(layer, expert) for layer, expert in order)
    one: list[float] = []
    several: list[float] = []
    start, done = time.perf_counter(), 0
    with ThreadPoolExecutor(READERS) as readers:
        while len(several) < 2 or time.perf_counter() - start < seconds:
            for number, times in ((1, one), (count, several)):
                part = [order[(done + i) % len(order)] for i in range(number)]
                done += number
                began = time.perf_counter()
                list(readers.map(lambda slot, which: store.fetch(slot, *which), slots, part))
                times.append(time.perf_counter() - began)
    together, alone = statistics.median(several), statistics.median(one)
    if count == 1:
        return DiskSpeed(mean / alone)
    each = max(together - alone, together / count / 2) / (count - 1)
    return DiskSpeed(mean / each, max(0.0, alone - each))


def file_speed(path: Path, seconds: float = SECONDS) -> DiskSpeed:
    """The speed of reading the beginning of a file in pieces of a few megabytes, past the page
    cache where the file system can."""
    slot = SlotMemory(PIECE, {PIECE: 1}).take(PIECE)
    assert slot is not None
    buffer = slot.view()
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        file = os.open(path, os.O_RDONLY)
    nbytes, start = 0, time.perf_counter()
    try:
        while time.perf_counter() - start < seconds:
            count = os.preadv(file, [buffer.numpy().data], nbytes)
            nbytes += count
            if count < PIECE:
                break
    finally:
        os.close(file)
    return DiskSpeed(max(nbytes, 1) / max(time.perf_counter() - start, 1e-9))
