"""How fast experts come from the disk, measured on some of them."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from moekit.runtime.pages import page_aligned
from moekit.runtime.store import ExpertStore

SECONDS = 0.25
PIECE = 2**22


def disk_bandwidth(store: ExpertStore, seconds: float = SECONDS) -> float:
    """Bytes a second of reading experts of `store`, one after the other in random order.

    Takes about twice `seconds`: each is read once before, so that checksums are not counted.
    Raises StoreError where one cannot be read.
    """
    order = [
        (layer, expert)
        for layer, described in enumerate(store.layers)
        for expert in range(described.num_experts)
    ]
    random.Random(0).shuffle(order)
    buffer = page_aligned(max(store.nbytes(layer, expert) for layer, expert in order))
    nbytes, taken = 0, 0.0
    for layer, expert in order:
        store.fetch(buffer, layer, expert)
        start = time.perf_counter()
        store.fetch(buffer, layer, expert)
        taken += time.perf_counter() - start
        nbytes += store.nbytes(layer, expert)
        if taken > seconds:
            break
    return nbytes / max(taken, 1e-9)


def file_bandwidth(path: Path, seconds: float = SECONDS) -> float:
    """Bytes a second of reading the beginning of a file in pieces of a few megabytes, past the page
    cache where the file system can."""
    buffer = page_aligned(PIECE)
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
    return max(nbytes, 1) / max(time.perf_counter() - start, 1e-9)
