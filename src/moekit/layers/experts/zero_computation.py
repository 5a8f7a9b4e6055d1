"""Experts that compute next to nothing: zero, copy and constant (MoE++, arXiv:2410.07348).

Shapes: T tokens, D width, E experts of the bank, N pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.registry import register

from ..routing import Pairs


@register(
    "expert",
    "zero",
    title="Experts that add nothing; also the null experts of AdaMoE",
    paper="MoE++, arXiv:2410.07348; AdaMoE, arXiv:2406.13233",
    needs=("training",),
)
class ZeroExperts(nn.Module):
    """E(x) = 0."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = 0

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        return torch.zeros_like(hidden)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)


@register(
    "expert",
    "copy",
    title="Experts that return their input",
    paper="MoE++, arXiv:2410.07348",
    needs=("training",),
)
class CopyExperts(nn.Module):
    """E(x) = x."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = 0

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        return hidden * _weight_of_token(pairs, pairs.weight, hidden)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        return rows


@register(
    "expert",
    "constant",
    title="Experts that mix their input with a learned vector",
    paper="MoE++, arXiv:2410.07348",
    needs=("training",),
    limits="Counted as free; three products of the width a row are left out of the cost.",
)
class ConstantExperts(nn.Module):
    """E(x) = a1 x + a2 v with (a1, a2) = softmax(W x), `mix` W [E, 2, D] and `vector` v [E, D]."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = 0
        self.mix = nn.Parameter(torch.empty(count, 2, width))
        self.vector = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.mix, std=0.02)
        nn.init.normal_(self.vector)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        # The bank's few experts on all tokens: cheaper than a matrix of its own for every pair.
        logits = hidden.float() @ self.mix.float().flatten(0, 1).T
        share = logits.unflatten(-1, (-1, 2)).softmax(-1)[pairs.token, pairs.expert]
        weighted = share * pairs.weight[:, None]
        own = _weight_of_token(pairs, weighted[:, 0], hidden)
        # Vectors of the bank weighted per token: [T, E] times [E, D], not one vector a pair.
        of_expert = weighted.new_zeros(hidden.shape[0], self.num_experts)
        of_expert = of_expert.index_put(
            (pairs.token, pairs.expert), weighted[:, 1], accumulate=True
        )
        return hidden * own + (of_expert @ self.vector.float()).to(hidden.dtype)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        share = (rows.float() @ self.mix[expert].float().T).softmax(-1).to(rows.dtype)
        return share[:, :1] * rows + share[:, 1:] * self.vector[expert].to(rows.dtype)


def _weight_of_token(pairs: Pairs, weight: Tensor, hidden: Tensor) -> Tensor:
    """Sum of `weight` [N] over the pairs of every token: [T, 1] in the dtype of `hidden`."""
    total = weight.new_zeros(hidden.shape[0]).index_add(0, pairs.token, weight)
    return total.to(hidden.dtype)[:, None]
