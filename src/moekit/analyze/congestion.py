"""The pressure towards balance at which the measured load is an equilibrium."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import blocks, check_filled
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace

Array = NDArray[np.float64]

LARGEST = 200.0
GRID = 41


@register(
    "measure",
    "congestion",
    title="Congestion coefficient: how strongly load is spread against the routers' preference",
    paper="Three Phases of Expert Routing 2604.04230",
    needs=("trace",),
    limits="The paper's estimator is not public; this follows its abstract. Largest value 200.",
    options={"quality": "what an expert is worth: its mean selected 'logit', or 'gate' weight"},
)
def congestion(trace: RoutingTrace, *, quality: str = "auto") -> Result:
    """Fit gamma in load = softmax(quality - gamma load) to every layer.

    0 means that load follows quality freely; the larger gamma, the stronger the spreading. `error`
    is the L1 distance between the fitted and the measured load, `free` that of gamma = 0. Quality
    is the mean router logit over the tokens that chose the expert, or the logarithm of its mean
    weight; auto takes logits where the trace has them. A layer whose experts are all worth the
    same and used the same says nothing about gamma: not a number.
    """
    check_filled(trace)
    if quality not in ("auto", "logit", "gate"):
        raise UserError(f"quality is 'auto', 'logit' or 'gate', not {quality!r}")
    if quality == "logit" and not trace.header.logits:
        raise UserError("the trace has no router logits; record with --logits, or use gate")
    by_logit = quality == "logit" or (quality == "auto" and trace.header.logits)
    table = []
    for position, layer in enumerate(trace.layers):
        load, worth = _load_and_worth(trace, position, by_logit)
        gamma, error, free = fit_congestion(load, worth)
        table.append((layer.index, gamma, error, free))
    known = [row[1] for row in table if np.isfinite(row[1])]
    return Result(
        ("layer", "gamma", "error", "free"),
        table,
        {
            "gamma": float(np.mean(known)) if known else float("nan"),
            "quality": "logit" if by_logit else "gate",
        },
        notes=[
            f"layer {row[0]}: gamma is at its largest value" for row in table if row[1] == LARGEST
        ],
    )


def equilibrium(worth: Array, gamma: Array) -> Array:
    """The loads [G, E] with load = softmax(worth [E] - gamma [G] load)."""
    gamma = np.asarray(gamma, dtype=np.float64)[:, None]
    load = np.full((len(gamma), len(worth)), 1 / len(worth))
    # The slope of softmax is at most 1/2, so this damping always contracts.
    step = 1 / (1 + gamma / 2)
    for _ in range(1000):
        score = worth - gamma * load
        score = np.exp(score - score.max(1, keepdims=True))
        change = step * (score / score.sum(1, keepdims=True) - load)
        load = load + change
        if np.abs(change).max() < 1e-9:
            break
    return load


def fit_congestion(load: Array, worth: Array) -> tuple[float, float, float]:
    """The gamma in [0, 200] whose equilibrium is nearest to `load` [E], its L1 error, and 0's.

    Experts without load have no measured worth and are left out. Not a number for fewer than two
    experts with load, and where no gamma fits better than another.
    """
    used = load > 0
    if used.sum() < 2:
        return float("nan"), float("nan"), float("nan")
    load, worth = load[used] / load[used].sum(), worth[used]
    low, high, free = 0.0, LARGEST, float("nan")
    for round_ in range(4):
        grid = np.linspace(low, high, GRID)
        errors = np.abs(equilibrium(worth, grid) - load).sum(1)
        if not round_:
            free = float(errors[0])
            if errors.max() - errors.min() < 1e-3:
                return float("nan"), float(errors.min()), free
        best = int(errors.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    return float(grid[best]), float(errors[best]), free


def _load_and_worth(trace: RoutingTrace, position: int, by_logit: bool) -> tuple[Array, Array]:
    """Choices and mean quality of every expert, [E] each."""
    num_experts = trace.layers[position].num_experts
    counts, sums = np.zeros(num_experts), np.zeros(num_experts)
    for tokens, ids in blocks(trace, position):
        routing = trace.layer(position, int(tokens[0]), int(tokens[-1]) + 1)
        if by_logit and routing.logits is not None:
            logits = routing.logits.float().numpy()
            values = np.take_along_axis(logits, np.maximum(ids, 0), axis=1)
        else:
            values = routing.topk_weights.float().numpy()
        real = ids >= 0
        counts += np.bincount(ids[real], minlength=num_experts)
        sums += np.bincount(ids[real], weights=values[real], minlength=num_experts)
    mean = sums / np.maximum(counts, 1)
    return counts, mean if by_logit else np.log(np.maximum(mean, 1e-12))
