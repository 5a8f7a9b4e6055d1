"""How well the experts of one layer tell those of the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.information import entropy, mutual_information
from moekit.analyze.reading import Ids, check_filled, multi_hot, pieces, read_ids, rows_of
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "layer-prediction",
    title="Predictability of the next layer's experts: transition entropy and recall",
    paper="EdgeMoE 2308.14352",
    needs=("trace",),
    options={"max_tokens": "tokens read, half to learn the transitions, half to test"},
)
def layer_prediction(trace: RoutingTrace, *, max_tokens: int = 2**16) -> Result:
    """Measure the transitions between the experts of neighbouring layers.

    `entropy` is that of the next layer's expert given one of this layer, `marginal` without it, and
    `bits` their mutual information; `chance` is the same between tokens that have nothing to do
    with each other. `recall` is the share of the next layer's experts among the K that a table of
    transitions finds likeliest, `popular` among the K most used; table and popularity are learned
    on every second piece and tested on the others. Raises UserError for one layer or one token.
    """
    check_filled(trace)
    if len(trace.layers) < 2:
        raise UserError("the trace has one MoE layer: there is no next layer to predict")
    rows = rows_of(pieces(trace, max_tokens, 512))
    if len(rows) < 4:
        raise UserError(f"{len(rows)} tokens are too few to learn and test transitions: record 4")
    half = (np.arange(len(rows)) // min(512, len(rows) // 2)) % 2 == 0
    table = []
    before = _read(trace, 0, rows)
    for position in range(1, len(trace.layers)):
        here, layer = _read(trace, position, rows), trace.layers[position]
        counts = (before.T @ here).astype(np.float64)
        shifted = (before.T @ np.roll(here, len(here) // 2, axis=0)).astype(np.float64)
        conditional = float(np.average(entropy(counts), weights=_weights(counts)))
        recall, popular = _recall(before, here, half, layer.top_k)
        table.append(
            (
                trace.layers[position - 1].index,
                layer.index,
                conditional,
                float(entropy(counts.sum(0))),
                float(mutual_information(counts)),
                float(mutual_information(shifted)),
                recall,
                popular,
            )
        )
        before = here
    return Result(
        ("layer", "next", "entropy", "marginal", "bits", "chance", "recall", "popular"),
        table,
        {
            "tokens": len(rows),
            "recall": float(np.mean([row[6] for row in table])),
            "popular": float(np.mean([row[7] for row in table])),
            "bits_above_chance": float(np.mean([row[4] - row[5] for row in table])),
        },
    )


def _read(trace: RoutingTrace, position: int, rows: Ids) -> NDArray[np.float32]:
    return multi_hot(read_ids(trace, position, rows), trace.layers[position].num_experts)


def _weights(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    used = counts.sum(1)
    return used if used.any() else np.ones_like(used)


def _recall(
    before: NDArray[np.float32], here: NDArray[np.float32], half: NDArray[np.bool_], top_k: int
) -> tuple[float, float]:
    """Recall on the other half of the experts predicted by transitions, and by popularity."""
    counts = before[half].T @ here[half]
    table = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    popularity = here[half].sum(0)
    # Popularity decides between experts that the table finds equally likely.
    scores = before[~half] @ table + 1e-6 * popularity / max(popularity.sum(), 1)
    actual = here[~half]
    guessed = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    used = max(float(actual.sum()), 1.0)
    recall = np.take_along_axis(actual, guessed, axis=1).sum() / used
    best = np.argsort(-popularity, kind="stable")[:top_k]
    return float(recall), float(actual[:, best].sum() / used)
