"""SCH: the hit rate of a cache that knows the next m tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import Piece, check_filled, numbers, pieces
from moekit.analyze.result import Result
from moekit.core.cache_score import CacheScore, policy
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.replay import accesses, replay
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "sch",
    title="Segment cache best hit rate, beside LRU, LFU and Belady's optimum",
    paper="Not All Models Suit Expert Offloading 2505.16056",
    needs=("trace",),
    limits="Filling an empty cache is free here, as in the paper; `cache-curve` counts it.",
    options={
        "windows": "tokens of the future that the cache knows, separated by commas",
        "ratios": "slots of a layer over its chosen experts, separated by commas",
        "max_tokens": "tokens read, in pieces spread evenly",
        "piece": "tokens after which a cache starts anew",
    },
)
def sch(
    trace: RoutingTrace,
    *,
    windows: str = "4,16,64,256",
    ratios: str = "1,1.5,2,3,4",
    max_tokens: int = 2**12,
    piece: int = 512,
) -> Result:
    """Measure the best hit rate of caches that look m tokens ahead, by slots.

    One cache a layer and sample, each starting empty; rows are the slots over K. Raises UserError
    for a ratio that leaves no slot.
    """
    check_filled(trace)
    slots = _slots(trace, numbers(ratios, "ratios"))
    chosen = pieces(trace, max_tokens, piece)
    ids, num_experts = _streams(trace, chosen)
    scores = {
        f"m={int(m)}": CacheScore(future="window", window=int(m))
        for m in numbers(windows, "windows")
    }
    scores |= {name: policy(name) for name in ("lru", "lfu", "belady")}
    found = {
        name: replay(ids, num_experts, score, list(slots.values()), free_start=True).hit_rate
        for name, score in scores.items()
    }
    table = [
        (ratio, count, *(float(found[name][number]) for name in found))
        for number, (ratio, count) in enumerate(slots.items())
    ]
    summary = {"tokens": sum(map(len, chosen)), "pieces": len(chosen)}
    return Result(("ratio", "slots", *found), table, summary)


def _slots(trace: RoutingTrace, ratios: list[float]) -> dict[float, int]:
    """Slots by ratio, as many as there are experts at most."""
    width = max(layer.top_k for layer in trace.layers)
    most = max(layer.num_experts for layer in trace.layers)
    slots = {ratio: round(ratio * width) for ratio in ratios}
    if min(slots.values()) < 1:
        raise UserError(f"a ratio of {min(ratios)} leaves no slot for top-{width}")
    return {ratio: count for ratio, count in slots.items() if count <= most} or {most / width: most}


def _streams(trace: RoutingTrace, chosen: list[Piece]) -> tuple[NDArray[np.int32], int]:
    """The accesses [T, N, K] with a stream for every layer of every piece, and the experts."""
    parts = [accesses(trace, piece.start, piece.stop) for piece in chosen]
    longest = max(len(ids) for ids, _ in parts)
    padded = [
        np.pad(ids, ((0, longest - len(ids)), (0, 0), (0, 0)), constant_values=-1)
        for ids, _ in parts
    ]
    return np.concatenate(padded, axis=1), parts[0][1]
