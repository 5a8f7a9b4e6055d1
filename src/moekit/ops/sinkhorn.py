"""Entropic optimal transport by Sinkhorn's iterations, in logarithms.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """A transport plan [R, C] and the logarithms of its scalings, rows [R] and columns [C].

    plan = exp(scores / temperature + rows[:, None] + columns): a softmax of every row after a bias
    was added to every column.
    """

    plan: Tensor
    rows: Tensor
    columns: Tensor


def sinkhorn(
    scores: Tensor, temperature: float, *, iterations: int, tolerance: float = 0.0
) -> Plan:
    """The plan that maximises <plan, scores> + temperature * entropy(plan).

    Rows of `scores` [R, C] sum to 1 and columns to R / C. Ends after `iterations`, or as soon as
    every column sum is within `tolerance` (relative) of what it should be (rows are exact, being
    updated last). Computed in float64, because scores divided by a small temperature leave float32
    no digits after the point. Differentiable. Raises ValueError for a temperature that is not
    positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    kernel = scores.double() / temperature
    share = kernel.new_tensor(scores.shape[0] / scores.shape[1])
    rows = kernel.new_zeros(scores.shape[0])
    columns = kernel.new_zeros(scores.shape[1])
    for _ in range(iterations):
        columns = share.log() - (kernel + rows[:, None]).logsumexp(0)
        rows = -(kernel + columns).logsumexp(1)
        if tolerance and _column_error(kernel, rows, columns, share) < tolerance:
            break
    plan = (kernel + rows[:, None] + columns).exp()
    return Plan(plan.to(scores.dtype), rows.to(scores.dtype), columns.to(scores.dtype))


@torch.no_grad()
def _column_error(kernel: Tensor, rows: Tensor, columns: Tensor, share: Tensor) -> float:
    sums = (kernel + rows[:, None] + columns).exp().sum(0)
    return float((sums / share - 1).abs().max())
