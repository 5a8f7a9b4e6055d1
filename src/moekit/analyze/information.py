"""Entropy, mutual information and its normalised pointwise form, of counts; all in bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def entropy(counts: NDArray[np.generic]) -> Array:
    """Entropy of the distributions along the last axis; 0 where nothing was counted."""
    weights = np.asarray(counts, dtype=np.float64)
    total = weights.sum(-1, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)


def mutual_information(joint: NDArray[np.generic]) -> Array:
    """Mutual information of the last two axes of counts [..., G, E]."""
    weights = np.asarray(joint, dtype=np.float64)
    flat = weights.reshape(*weights.shape[:-2], -1)
    return entropy(weights.sum(-1)) + entropy(weights.sum(-2)) - entropy(flat)


def npmi(joint: NDArray[np.generic]) -> Array:
    """Normalised pointwise mutual information in [-1, 1] of every cell of counts [..., G, E].

    -1 where the two never meet, 1 where they only meet each other, 0 where they are independent
    and where one of them does not occur at all.
    """
    weights = np.asarray(joint, dtype=np.float64)
    total = weights.sum((-2, -1), keepdims=True)
    share = weights / np.where(total > 0, total, 1)
    expected = share.sum(-1, keepdims=True) * share.sum(-2, keepdims=True)
    met = (share > 0) & (share < 1)
    pointwise = np.log2(np.where(met, share, 1) / np.where(met, expected, 1))
    value = pointwise / -np.log2(np.where(met, share, 0.5))
    return np.where(met, value, np.where((share == 0) & (expected > 0), -1.0, 0.0))


def jensen_shannon(first: Array, second: Array) -> Array:
    """Jensen-Shannon divergence of the distributions along the last axis, in [0, 1]."""
    first = first / first.sum(-1, keepdims=True)
    second = second / second.sum(-1, keepdims=True)
    return entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2


def p_value(observed: float | Array, null: Array) -> Array:
    """Share of null values (first axis) at least as large, the observed one counted with them."""
    # The tolerance keeps equal values equal when their sums were rounded in another order.
    at_least = null >= np.asarray(observed) - 1e-12
    return (1 + at_least.sum(0)) / (1 + len(null))


def spearman(first: Array, second: Array) -> float:
    """Rank correlation; not a number if either does not vary."""
    one, two = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    one, two = one - one.mean(), two - two.mean()
    scale = float(np.sqrt((one**2).sum() * (two**2).sum()))
    return float(one @ two) / scale if scale else float("nan")


def _ranks(values: Array) -> Array:
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return below + (equal - 1) / 2
