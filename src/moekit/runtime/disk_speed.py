"""How fast experts come from the disk, measured on some of them."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moekit.runtime.expert_cache import READERS
from moekit.runtime.native_readers import open_readers
from moekit.runtime.readers import Load
from moekit.runtime.residency import record_sizes
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
    """Read experts of `store` in random order as an expert cache does, for about `seconds`: by the
    same readers, checksums verified, into slots, whose large pages make a read up to twice as fast,
    one expert and several in turn. Holds `nbytes` bytes meanwhile, or one expert.

    Raises StoreError where one cannot be read.
    """
    sizes = record_sizes(store)
    order = np.flatnonzero(sizes).tolist()
    random.Random(0).shuffle(order)
    size = int(sizes.max())
    count = max(1, min(TOGETHER, len(order), nbytes // size))
    memory = SlotMemory(count * size, {size: count})
    taken = [memory.take(size) for _ in range(count)]
    slots = [slot for slot in taken if slot is not None]
    for slot in slots:
        # The first write to a page takes longer.
        slot.view().zero_()
    one: list[float] = []
    several: list[float] = []
    start, done = time.perf_counter(), 0
    with closing(_Reading(store, sizes.shape[1])) as reading:
        while len(several) < 2 or time.perf_counter() - start < seconds:
            for number, times in ((1, one), (count, several)):
                loads = []
                for place, slot in enumerate(slots[:number]):
                    which = order[(done + place) % len(order)]
                    part = replace(slot, size=int(sizes.flat[which]))
                    loads.append(Load(which, part, "demand"))
                done += number
                began = time.perf_counter()
                reading.all(loads)
                times.append(time.perf_counter() - began)
    mean = float(sizes[sizes > 0].mean())
    together, alone = statistics.median(several), statistics.median(one)
    if count == 1:
        return DiskSpeed(mean / alone)
    each = max(together - alone, together / count / 2) / (count - 1)
    return DiskSpeed(mean / each, max(0.0, alone - each))


class _Reading:
    """The readers of a store without a cache."""

    def __init__(self, store: ExpertStore, experts: int) -> None:
        self._lock, self._left = threading.Lock(), 0
        self._error: BaseException | None = None
        self._readers = open_readers(
            store, experts, READERS, self._lock, finished=self._finished, spare=lambda evicts: None
        )

    def all(self, loads: Sequence[Load]) -> None:
        """Return when all are read; raises the error of one that could not be."""
        with self._lock:
            self._left = len(loads)
            for load in loads:
                self._readers.demand(load)
            while self._left:
                self._readers.wait()
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        self._readers.close()

    def _finished(self, load: Load, error: BaseException | None) -> None:
        self._left -= 1
        self._error = self._error or error


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
