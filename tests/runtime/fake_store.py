"""A store of records in memory whose reads can be held, delayed and made to fail, and its use."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from moekit.core.packed import PAGE
from moekit.runtime.store import StoreError


class FakeStore:
    """`sizes` [L][E] are pages of each record; every byte of a record is its own number."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.layers = [SimpleNamespace(num_experts=len(row)) for row in sizes]
        self.reads = []  # (layer, expert) in the order they began
        self.broken = set()
        self.before = lambda layer, expert: None  # called by the reader before it reads
        self._held = {}

    @classmethod
    def even(cls, layers, experts, pages=1):
        return cls([[pages] * experts for _ in range(layers)])

    def nbytes(self, layer, expert):
        return self.sizes[layer][expert] * PAGE

    def fetch(self, buffer, layer, expert):
        assert len(buffer) == self.nbytes(layer, expert)
        assert buffer.data_ptr() % PAGE == 0
        self.reads.append((layer, expert))
        self.before(layer, expert)
        if (layer, expert) in self._held:
            began, go_on = self._held[layer, expert]
            began.set()
            assert go_on.wait(30)
        buffer[: PAGE // 2] = self.mark(layer, expert)
        if (layer, expert) in self.broken:
            raise StoreError(f"expert {expert} of layer {layer} is damaged")
        buffer[PAGE // 2 :] = self.mark(layer, expert)

    def hold(self, layer, expert):
        """Let the next reads of an expert wait; returns `began` and `go_on` (events)."""
        self._held[layer, expert] = threading.Event(), threading.Event()
        return self._held[layer, expert]

    def mark(self, layer, expert):
        return (layer * 37 + expert * 11 + 5) % 251

    def whole(self, record, layer, expert):
        """Whether a record holds this expert, from the first to the last byte."""
        return bool((record == self.mark(layer, expert)).all())


def portions(claim):
    if claim.ready:
        yield claim.ready
    yield from claim.arrivals()


def serve(cache, layer, experts, **options):
    """Use experts as an engine does; returns those that were ready."""
    with cache.begin(layer, experts, **options) as claim:
        for portion in (claim.ready, *claim.arrivals()):
            for expert in portion:
                assert cache.store.whole(cache.record(layer, expert), layer, expert)
        return claim.ready


def settle(cache, hints=True):
    """Wait until no read is in flight, and no hint is left to read."""
    with cache._lock:
        while cache._loads or (hints and cache._hints):
            cache._readers.wait()
