"""Hints for an expert cache while a model runs, from what its routers choose."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.port import SeamCall
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.native_runner import Routed
from moekit.runtime.predict.prefetch import Prefetcher

# Seconds that predicting takes a layer, measured on two cores of Zen 4, and how many times that a
# read must take for reading ahead to gain anything.
PREDICTION_SECONDS, TIMES = 4e-4, 3
# Weights in running means: of the last layer in the time a layer computes, and of the last pass in
# the time that predicting it took.
NEWEST, NEWEST_PASS = 0.05, 0.25


class Prefetching:
    """Shows a prefetcher every router's choice and hands its hints to the cache.

    It predicts when the cache has asked for the layer's own experts, while those are read.
    """

    def __init__(self, cache: ExpertCache | DeviceCache, prefetcher: Prefetcher) -> None:
        self.prefetcher = prefetcher
        self._cache = cache
        self._last: tuple[float, float] | None = None
        self._predicting = 0.0

    def seam(self, call: SeamCall) -> None:
        """What happens at the seam of a model in torch."""
        hidden = call.hidden if call.router_input is None else call.router_input
        self._observe(call.layer.position, call.ids.cpu(), hidden.reshape(-1, hidden.shape[-1]))

    def routed(self, routed: Routed) -> None:
        """What the native runner tells of a layer."""
        self._observe(routed.layer, routed.ids, routed.hidden)

    def _observe(self, layer: int, ids: ArrayLike, hidden: ArrayLike) -> None:
        self._time_layer(layer)
        ahead = self.prefetcher
        if layer == 0:
            self._begin()
        reads = ahead.predictor.reads_hidden
        if ahead.resting and reads:
            return
        began = time.perf_counter()
        table = self._cache.table
        # Choices beyond the experts are those that nothing is read for, such as identities.
        chosen = np.asarray(ids)
        chosen = np.where(chosen < table.shape[1], chosen, -1)
        if ahead.resting:
            ahead.predictor.observe(layer, chosen)
            return
        ahead.settle(layer, chosen, hidden if reads else None, table)
        self._predicting += time.perf_counter() - began
        self._cache.then(self._hint)

    def _begin(self) -> None:
        ahead = self.prefetcher
        if not ahead.resting:
            ahead.prediction_seconds += NEWEST_PASS * (self._predicting - ahead.prediction_seconds)
        self._predicting = 0.0
        ahead.start_pass(None)

    def _hint(self) -> None:
        began = time.perf_counter()
        for hint in self.prefetcher.hints(self._cache.table):
            self._cache.hint(hint.layer, hint.ids)
        if not self.prefetcher.missing:
            # Otherwise it costs nothing: the layer waits for its own experts.
            self._predicting += time.perf_counter() - began

    def _time_layer(self, layer: int) -> None:
        """Keep up the time from layer to layer in which nothing was waited for."""
        now: tuple[float, float] = time.perf_counter(), self._cache.stats.wait_seconds
        if self._last is not None and layer > 0:
            seconds = now[0] - self._last[0] - (now[1] - self._last[1])
            mean = self.prefetcher.layer_seconds
            self.prefetcher.layer_seconds = max(0.0, mean + NEWEST * (seconds - mean))
        self._last = now


class Filling:
    """Reads the rest of the experts beside the first steps, where all of them fit.

    `done` is called once when every expert is in memory.
    """

    def __init__(self, cache: ExpertCache, done: Callable[[], None]) -> None:
        self._cache = cache
        self._done = done

    def routed(self, routed: Routed) -> None:
        """What the native runner tells of a layer; the last one of a step gives the occasion."""
        if routed.layer + 1 < len(self._cache.table):
            return
        if self._cache.complete:
            self._done()
            return
        self._cache.then(self._hint_missing)

    def _hint_missing(self) -> None:
        for layer, described in enumerate(self._cache.store.layers):
            missing = np.flatnonzero(self._cache.table[layer, : described.num_experts] == 0)
            if len(missing):
                self._cache.hint(layer, missing.tolist())


def pays(sizes: NDArray[np.int64], bandwidth: float) -> bool:
    """Whether experts of `sizes` bytes, 0 for none, take long enough to read at `bandwidth` bytes a
    second to be predicted."""
    return float(sizes[sizes > 0].mean()) / bandwidth > TIMES * PREDICTION_SECONDS


def new_prefetcher(
    predictor: Any,
    cache: ExpertCache | DeviceCache,
    num_experts: int,
    top_k: int,
    bandwidth: float,
) -> Prefetcher:
    """A prefetcher for `cache` whose experts come with `bandwidth` bytes a second."""
    sizes = [
        max(cache.store.nbytes(position, e) for e in range(layer.num_experts))
        for position, layer in enumerate(cache.store.layers)
    ]
    return Prefetcher(
        predictor,
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=sizes,
        bandwidth=bandwidth,
        layer_seconds=0.0,
    )
