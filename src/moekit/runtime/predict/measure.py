"""How good a predictor is: recall and precision by budget, and the bytes that it would waste.

Shapes: B budgets, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.runtime.predict.predictor import REACH, Predictor
from moekit.runtime.predict.recorded import Recording


@dataclass(frozen=True)
class Quality:
    """A predictor some layers ahead, at budgets of so many experts a layer and pass.

    `recall` [B] is the share of the used experts that are among the predicted, `precision` [B] the
    share of the predicted that are used, `wasted` [B] the unused experts read for each that a pass
    uses: times an expert's bytes, bytes wasted over bytes needed where nothing is cached. `chance`
    [B] is the recall of a random order, `by_layer` the recall of each target layer at the number of
    experts that it used.
    """

    ahead: int
    budgets: tuple[int, ...]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    wasted: NDArray[np.float64]
    chance: NDArray[np.float64]
    by_layer: NDArray[np.float64]


def measure(
    predictor: Predictor,
    recording: Recording,
    *,
    budgets: Sequence[int] | None = None,
    reach: int = REACH,
    batch: int = 1,
) -> list[Quality]:
    """Replay a recording, `batch` sequences at a time, and score every prediction 1 to `reach`
    layers ahead.

    `budgets` are K, 3/2 K and 2 K unless given. Every layer is predicted from the one so far before
    it; layers without one before them are left out. Raises UserError for a budget outside 1 to E.
    """
    experts, top_k = recording.num_experts, recording.top_k
    budgets = tuple(
        budgets or sorted({min(experts, n) for n in (top_k, top_k * 3 // 2, 2 * top_k)})
    )
    if not 1 <= min(budgets) <= max(budgets) <= experts:
        raise UserError(f"budgets are 1 to {experts} experts, not {list(budgets)}")
    layers = len(recording.ids)
    reach = min(reach, layers - 1)
    hits = np.zeros((reach, layers, len(budgets)))
    own = np.zeros((reach, layers))
    used_total = np.zeros((reach, layers))
    predictions = np.zeros((reach, layers))
    predictor.start(layers, experts, top_k)
    for fresh, rows in recording.passes(batch):
        if fresh:
            predictor.start(layers, experts, top_k)
        predictor.begin(recording.tokens[rows])
        used = [np.zeros(experts, dtype=bool) for _ in range(layers)]
        for layer in range(layers):
            ids = recording.ids[layer][rows]
            used[layer][ids[ids >= 0]] = True
        for layer in range(layers - 1):
            show(predictor, recording, layer, rows)
            for ahead in range(1, min(reach, layers - 1 - layer) + 1):
                target, row = layer + ahead, ahead - 1
                order = np.argsort(-predictor.predict(layer, ahead), kind="stable")
                found = used[target][order].cumsum()
                count = int(found[-1])
                hits[row, target] += found[np.array(budgets) - 1]
                own[row, target] += found[count - 1] if count else 0
                used_total[row, target] += count
                predictions[row, target] += 1
    return [
        _quality(row + 1, budgets, hits[row], own[row], used_total[row], predictions[row], experts)
        for row in range(reach)
    ]


def show(predictor: Predictor, recording: Recording, layer: int, rows: NDArray[np.int64]) -> None:
    """Let the predictor observe a layer of a recorded pass."""
    hidden = None if recording.hidden is None else recording.hidden[layer][rows]
    predictor.observe(layer, recording.ids[layer][rows], hidden)


def _quality(
    ahead: int,
    budgets: tuple[int, ...],
    hits: NDArray[np.float64],
    own: NDArray[np.float64],
    used: NDArray[np.float64],
    predictions: NDArray[np.float64],
    num_experts: int,
) -> Quality:
    sizes = np.array(budgets)
    read = sizes * predictions.sum()
    needed = max(float(used.sum()), 1.0)
    return Quality(
        ahead,
        budgets,
        hits.sum(0) / needed,
        hits.sum(0) / np.maximum(read, 1),
        (read - hits.sum(0)) / needed,
        sizes / num_experts,
        np.divide(own, used, out=np.full(len(used), np.nan), where=used > 0),
    )
