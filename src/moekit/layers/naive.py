"""The oracle: one pair of a token and an expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .pool import ExpertPool
from .routing import Routing


def naive_pool(pool: ExpertPool, hidden: Tensor, routing: Routing) -> Tensor:
    """What `pool(hidden, routing)` [T, D] must be, outputs and gradients: a loop over pairs."""
    out = [torch.zeros_like(row) for row in hidden]
    for token, expert, weight in zip(
        routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True
    ):
        row = pool.run_one(expert, hidden[token : token + 1])[0]
        out[token] = out[token] + weight * row
    return torch.stack(out)
