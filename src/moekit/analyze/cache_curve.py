"""Hit rate against capacity, for the cache policies and the optimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import Piece, check_filled, pieces
from moekit.analyze.result import Result
from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.replay import accesses, replay
from moekit.core.trace import RoutingTrace

POLICIES = ("lru", "lfu", "lfu-aged", "hot-set", "belady")


@register(
    "measure",
    "cache-curve",
    title="Demand hit rate of an expert cache by capacity: Belady's optimum and the policies",
    paper="Not All Models Suit Expert Offloading 2505.16056",
    needs=("trace",),
    options={
        "max_tokens": "tokens replayed, in pieces spread evenly",
        "piece": "tokens of a piece",
        "shared": "one pool of slots for all layers instead of slots for each",
    },
)
def cache_curve(
    trace: RoutingTrace, *, max_tokens: int = 2**12, piece: int = 512, shared: bool = False
) -> Result:
    """Measure demand hits over accesses with the cold start counted, from K slots to all experts.

    The pieces follow one another through the same cache, which holds the experts of a token until
    all are inside. The static hot set is learned on the other pieces. `uniform` is the share of
    experts inside: what independent uniform routing would hit. Raises UserError for a trace too
    short to learn a hot set from.
    """
    check_filled(trace)
    read = pieces(trace, 2 * max_tokens, piece)
    learned, chosen = read[0::2], read[1::2]
    if not chosen:
        half = len(read[0]) // 2
        if not half:
            raise UserError("one token is too little to replay through a cache")
        only = read[0]
        learned = [Piece(only.start, only.start + half, only.sample, only.position, only.domain)]
        chosen = [Piece(only.start + half, only.stop, only.sample, 0, only.domain)]
    ids, num_experts = _joined(trace, chosen, shared)
    profile = _profile(*_joined(trace, learned, shared))
    width = ids.shape[2]
    active = width * (len(trace.layers) if shared else 1)
    capacities = _capacities(active, num_experts)
    layers = len(trace.layers) if shared else 1
    found = {
        name: replay(
            ids, num_experts, policy(name), capacities, layers=layers, hold=True, profile=profile
        ).hit_rate
        for name in POLICIES
    }
    table = [
        (
            slots,
            slots / active,
            slots / num_experts,
            *(float(found[name][number]) for name in POLICIES),
        )
        for number, slots in enumerate(capacities)
    ]
    double = next((row for row in table if row[1] >= 2), table[-1])
    return Result(
        ("slots", "over active", "uniform", *POLICIES),
        table,
        {
            "tokens": sum(map(len, chosen)),
            "shared": shared,
            "slots_at_twice_active": double[0],
            "lru_at_twice_active": double[3],
            "belady_at_twice_active": double[-1],
        },
    )


def _joined(
    trace: RoutingTrace, chosen: list[Piece], shared: bool
) -> tuple[NDArray[np.int32], int]:
    parts = [accesses(trace, piece.start, piece.stop, shared=shared) for piece in chosen]
    return np.concatenate([ids for ids, _ in parts]), parts[0][1]


def _profile(ids: NDArray[np.int32], num_experts: int) -> NDArray[np.float64]:
    """Uses by stream and expert, [N, E]."""
    streams = [column[column >= 0] for column in np.moveaxis(ids, 1, 0)]
    return np.stack([np.bincount(s, minlength=num_experts) for s in streams]).astype(np.float64)


def _capacities(active: int, num_experts: int) -> list[int]:
    steps = {round(active * ratio) for ratio in (1, 1.5, 2, 3, 4)}
    steps |= {round(num_experts * share) for share in (0.5, 0.75, 1)}
    return sorted(slots for slots in steps if active <= slots <= num_experts)
