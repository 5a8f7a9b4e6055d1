"""What a trace tells before a model runs: which experts are used, and found in memory.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moekit.core.cache_score import CacheScore
from moekit.core.errors import UserError
from moekit.core.replay import accesses, replay
from moekit.core.trace import RoutingTrace


def open_trace(path: str | Path, experts: Sequence[int]) -> RoutingTrace:
    """The trace at `path` of a model with so many `experts` in each MoE layer.

    Raises UserError for anything else.
    """
    trace = RoutingTrace.open(path)
    found = [layer.num_experts for layer in trace.layers]
    if found != list(experts):
        raise UserError(
            f"the trace {path} is of another model: {len(found)} MoE layers of {max(found)} "
            f"experts, not {len(experts)} of {max(experts)}"
        )
    return trace


def usage(trace: RoutingTrace) -> NDArray[np.float64]:
    """How often each expert was chosen, [L, E]."""
    ids, experts = accesses(trace)
    return np.stack(
        [
            np.bincount(layer[layer >= 0], minlength=experts)
            for layer in ids.transpose(1, 0, 2).reshape(len(trace.layers), -1)
        ]
    ).astype(np.float64)


def expected_hit_rate(trace: RoutingTrace, score: CacheScore, slots: int) -> float:
    """The share of experts found in `slots` slots that all layers share, over the second half of
    the trace: the first fills the cache."""
    layers = len(trace.layers)
    counts = usage(trace).reshape(1, -1) if score.profile else None
    hits = asked = 0
    for sign, stop in ((1, len(trace)), (-1, len(trace) // 2)):
        ids, experts = accesses(trace, 0, stop, shared=True)
        if not len(ids):
            continue
        slots = max(slots, ids.shape[2])
        done = replay(ids, experts, score, [slots], layers=layers, hold=True, profile=counts)
        hits += sign * int(done.hits.sum())
        asked += sign * int(done.accesses.sum())
    return hits / asked if asked else 1.0
