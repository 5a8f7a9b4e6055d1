"""Choosing a cache policy for a model and a cache by replaying a short trace of its routing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.core.cache_score import policy
from moekit.core.port import SeamCall
from moekit.core.replay import replay
from moekit.core.view import MoEView
from moekit.runtime.cache_stats import CacheStats
from moekit.runtime.engine import Engine
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.native_runner import NativeRunner, Routed

# Those that need neither a profile nor router scores; the first is the default.
CANDIDATES = ("auto", "lru", "lfu", "shallow-first")
# Another policy is taken only where it finds this much more: the trace is short.
MARGIN = 0.02
TOKENS, SECONDS = 64, 5.0
TEXT = (
    "The harbour town woke slowly. Boats came in with the tide, and the first buyers were already "
    "arguing about the price of herring. def total(xs): return sum(x * x for x in xs) # squares. "
    "In 1912 the bridge was 340 metres long; today, after three repairs, it is a little shorter."
)


@dataclass(frozen=True)
class PolicyChosen:
    """A policy, and the share of experts that each candidate finds in memory on the trace."""

    name: str
    hit_rates: dict[str, float]
    tokens: int

    @property
    def reason(self) -> str:
        """One line for the user."""
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in self.hit_rates.items())
        return (
            f"policy {self.name}: experts found in memory on a trace of {self.tokens} tokens: "
            f"{rates}"
        )


def choose_policy(engine: Engine) -> PolicyChosen | None:
    """Decode a short text and replay its routing through every candidate; None without tokenizer.

    Ends after a few seconds, and the engine's counts begin anew. Raises StoreError where an expert
    cannot be read.
    """
    if engine.tokenizer is None or engine.cache is None:
        return None
    ids = engine.tokenizer(TEXT)["input_ids"][: min(TOKENS, engine.max_context)]
    layers = engine.cache.store.layers
    experts = max(layer.num_experts for layer in layers)
    steps = routing_of(engine, ids, experts)
    engine.cache.stats = CacheStats(peak_bytes=engine.cache.stats.peak_bytes)
    record = max(engine.cache.store.nbytes(0, e) for e in range(layers[0].num_experts))
    slots = max(engine.cache.nbytes // record, steps.shape[2])
    rates = {
        name: float(
            replay(
                steps,
                len(layers) * experts,
                policy(name),
                [slots],
                layers=len(layers),
                hold=True,
            ).hit_rate[0]
        )
        for name in CANDIDATES
    }
    best = max(CANDIDATES, key=lambda name: rates[name])
    chosen = best if rates[best] > rates[CANDIDATES[0]] + MARGIN else CANDIDATES[0]
    return PolicyChosen(chosen, rates, len(steps) // len(layers))


def routing_of(engine: Engine, ids: Sequence[int], experts: int) -> NDArray[np.int32]:
    """What the routers choose for `ids`, decoded one by one: [T * L, 1, K], an expert numbered
    layer * `experts` + expert, -1 for none."""
    steps: list[NDArray[np.int32]] = []

    def keep(layer: int, chosen: NDArray[np.integer]) -> None:
        row = np.asarray(chosen, dtype=np.int32).reshape(1, -1)
        real = (row >= 0) & (row < experts)
        steps.append(np.where(real, row + layer * experts, -1))

    sequence = engine.runner.new_sequence(len(ids))
    start = time.perf_counter()
    with watch_routing(engine, keep):
        for token in ids:
            engine.runner.forward([sequence], [[token]])
            if time.perf_counter() - start > SECONDS:
                break
    engine.runner.drop(sequence)
    width = max(step.shape[1] for step in steps)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1])), constant_values=-1) for s in steps]
    return np.stack(padded)


@contextmanager
def watch_routing(
    engine: Engine, keep: Callable[[int, NDArray[np.integer]], None]
) -> Iterator[None]:
    """Call `keep(layer, ids)`, ids [T, K] that hold until it returns, at every MoE layer of a
    step."""
    runner = engine.runner
    if isinstance(runner, NativeRunner):
        earlier = runner.observer

        def routed(now: Routed) -> None:
            keep(now.layer, now.ids)
            if earlier is not None:
                earlier(now)

        runner.observer = routed
        try:
            yield
        finally:
            runner.observer = earlier
        return
    assert isinstance(runner, GraphRunner)

    def seen(call: SeamCall) -> None:
        keep(call.layer.position, call.ids.numpy())

    with MoEView(runner.model).observe(seen):
        yield
