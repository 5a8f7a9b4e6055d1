"""Which tokens a capacity limit would drop, by their place in the sequence."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import Ids, check_filled, multi_hot, pieces, read_ids, rows_of
from moekit.analyze.result import Result
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace

QUARTERS = 4


@register(
    "measure",
    "capacity-drop",
    title="Choices dropped under a capacity limit, from the start to the end of a sequence",
    paper="OpenMoE 2402.01739",
    needs=("trace",),
    limits="Capacity is counted in each sequence, in order of position, choice by choice.",
    options={
        "capacity_factor": "slots of an expert, over the mean load",
        "max_tokens": "tokens read, in whole samples spread evenly",
        "seed": "seed of the shuffled comparison",
    },
)
def capacity_drop(
    trace: RoutingTrace,
    *,
    capacity_factor: float = 1.25,
    max_tokens: int = 2**16,
    seed: int = 0,
) -> Result:
    """Measure the share of choices that overflow an expert's capacity, by quarter of the sequence.

    An expert takes ceil(capacity_factor K T / E) choices of a sequence of T tokens. Any imbalance
    fills an expert before the end, so `rise` (last quarter minus first) stands beside the rise
    with the tokens in random order: `drift` is the difference, what the order adds.
    """
    check_filled(trace)
    chosen = [p for p in pieces(trace, max_tokens, 4096, leading=True) if len(p) >= QUARTERS]
    random = np.random.default_rng(derive_seed(seed, "capacity-drop"))
    orders = [random.permutation(len(piece)) for piece in chosen]
    table, by_domain = [], {name: np.zeros((2, QUARTERS)) for name in trace.domains}
    rows = rows_of(chosen) if chosen else np.empty(0, dtype=np.int64)
    ends = np.cumsum([len(piece) for piece in chosen])
    for position, layer in enumerate(trace.layers):
        ids = read_ids(trace, position, rows) if chosen else np.empty((0, 1), dtype=np.int64)
        sums, shuffled = np.zeros((2, QUARTERS)), np.zeros((2, QUARTERS))
        for piece, end, order in zip(chosen, ends, orders, strict=True):
            own = ids[end - len(piece) : end]
            counts = _dropped(own, layer.num_experts, capacity_factor)
            sums += counts
            by_domain[piece.domain] += counts
            shuffled += _dropped(own[order], layer.num_experts, capacity_factor)
        rate, chance = (_rate(counts) for counts in (sums, shuffled))
        rise, chance_rise = float(rate[-1] - rate[0]), float(chance[-1] - chance[0])
        dropped = float(sums[0].sum() / max(sums[1].sum(), 1))
        table.append((layer.index, dropped, *rate.tolist(), rise, rise - chance_rise))
    return Result(
        ("layer", "dropped", "1st", "2nd", "3rd", "4th", "rise", "drift"),
        table,
        {
            "tokens": len(rows),
            "capacity_factor": capacity_factor,
            "dropped": _mean([row[1] for row in table]),
            "rise": _mean([row[6] for row in table]),
            "drift": _mean([row[7] for row in table]),
        },
        {"by_domain": {name: _rate(counts) for name, counts in by_domain.items()}},
    )


def _dropped(ids: Ids, num_experts: int, factor: float) -> NDArray[np.float64]:
    """Dropped choices and all choices of one sequence by quarter, [2, 4]."""
    real = ids >= 0
    slots = math.ceil(factor * real.sum() / num_experts)
    taken = np.cumsum(multi_hot(ids, num_experts), axis=0)
    place = np.take_along_axis(taken, np.maximum(ids, 0), axis=1)
    over = real & (place > slots)
    bounds = np.arange(QUARTERS) * len(ids) // QUARTERS
    return np.stack([np.add.reduceat(x.sum(1), bounds) for x in (over, real)]).astype(np.float64)


def _rate(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return counts[0] / np.maximum(counts[1], 1)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
