"""How many other experts are used before one is used again."""

from __future__ import annotations

import numpy as np

from moekit.analyze.reading import check_filled, pieces, read_ids, rows_of
from moekit.analyze.result import Result
from moekit.core.registry import register
from moekit.core.replay import stack_distances
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "reuse-distance",
    title="Distinct experts between two uses of an expert, beside tokens in random order",
    paper="Not All Models Suit Expert Offloading 2505.16056",
    needs=("trace",),
    options={
        "max_tokens": "tokens read, in pieces spread evenly",
        "seed": "seed of the random order",
    },
)
def reuse_distance(trace: RoutingTrace, *, max_tokens: int = 2**15, seed: int = 0) -> Result:
    """Measure the reuse (stack) distance of every layer's accesses.

    `within 2K` is the share below 2K: what an LRU cache of twice the active experts hits.
    `shuffled` is the same with the tokens in random order, which keeps every expert's load and
    destroys what is near in time; `locality` is the difference. The histogram by distance is in the
    detail: its running sum is the LRU hit rate at every capacity.
    """
    check_filled(trace)
    rows = rows_of(pieces(trace, max_tokens, 4096))
    order = np.random.default_rng(derive_seed(seed, "reuse-distance")).permutation(len(rows))
    table, histograms = [], []
    for position, layer in enumerate(trace.layers):
        ids = read_ids(trace, position, rows)[:, None, :]
        found = stack_distances(ids, layer.num_experts)
        found = found[found >= 0]
        shuffled = stack_distances(ids[order], layer.num_experts)
        near = 2 * layer.top_k
        chance = (shuffled[shuffled >= 0] < near).mean() if found.size else 0.0
        histogram = np.bincount(found, minlength=layer.num_experts + 1)
        histograms.append(histogram)
        median, tail = np.quantile(found, [0.5, 0.9]) if found.size else (0.0, 0.0)
        within = float((found < near).mean()) if found.size else 0.0
        table.append(
            (layer.index, float(median), float(tail), within, float(chance), within - float(chance))
        )
    return Result(
        ("layer", "median", "90 %", "within 2K", "shuffled", "locality"),
        table,
        {"tokens": len(rows), "locality": float(np.mean([row[-1] for row in table]))},
        {"histogram": histograms},
    )
