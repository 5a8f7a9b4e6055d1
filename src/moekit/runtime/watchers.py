"""What watches the routers of an engine: router scores for the cache, and reading ahead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.core.trace import RoutingTrace
from moekit.runtime.disk_speed import BYTES, disk_speed
from moekit.runtime.expert_cache import ExpertCache, record_sizes
from moekit.runtime.native_runner import NativeRunner, Routed
from moekit.runtime.predict.files import make_predictor
from moekit.runtime.predict.gates import Gate
from moekit.runtime.predict.predictor import Predictor
from moekit.runtime.prefetch import Prefetching, new_prefetcher, pays
from moekit.runtime.recent_scores import RecentScores

AUTO, PREDICTOR = "auto", "next-gate"


def watchers(
    cache: ExpertCache,
    spec: MoESpec,
    gates: Callable[[], list[Gate]],
    predictor: str | Predictor | None,
    trace: RoutingTrace | None,
    note: Callable[[str], None],
) -> list[RecentScores | Prefetching]:
    """What a cache that does not hold everything needs to be told of the routers.

    `predictor` None reads nothing ahead; "auto" is the next layers' own routers, where reading an
    expert takes long enough. Raises UserError as `make_predictor` does.
    """
    found: list[Gate] | None = None
    # Some routers cannot be asked; then uses count in place of scores.
    with suppress(UserError):
        found = gates()
    made: list[RecentScores | Prefetching] = []
    if cache.score.near and found is not None:
        made.append(RecentScores(cache, found))
    if predictor is None or (predictor == AUTO and found is None):
        return made
    # Within the memory of the cache, which is empty.
    bandwidth = disk_speed(cache.store, nbytes=min(BYTES, cache.nbytes)).bandwidth
    if predictor == AUTO:
        if not pays(record_sizes(cache.store), bandwidth):
            note("nothing is read ahead: predicting takes as long as a read")
            return made
        predictor = PREDICTOR
    if isinstance(predictor, str):
        traces = None if trace is None else [trace]
        predictor = make_predictor(predictor, gates=found, traces=traces)
    ahead = new_prefetcher(predictor, cache, spec.num_experts, spec.top_k, bandwidth)
    return [*made, Prefetching(cache, ahead)]


def in_turn(observers: list[Callable[[Routed], None]]) -> Callable[[Routed], None]:
    """One observer that tells several."""

    def routed(now: Routed) -> None:
        for observer in observers:
            observer(now)

    return observers[0] if len(observers) == 1 else routed


def native_gates(runner: NativeRunner, spec: MoESpec) -> list[Gate]:
    """The routers of a native runner."""

    def values(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: torch.from_numpy(runner.router_scores(layer, hidden.numpy()))

    return [Gate(values(layer), described.top_k) for layer, described in enumerate(spec.per_layer)]
