"""Experts of one matrix and a bias (Switch-DiT, arXiv 2403.09176).

Shapes: D width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.registry import register

from ..compute import grouped_linear, run_sorted
from ..routing import Pairs


@register(
    "expert",
    "linear",
    title="Experts of one matrix and a bias, which add nothing at the start",
    paper="Switch-DiT, arXiv:2403.09176",
    needs=("training",),
)
class LinearExperts(nn.Module):
    """W x + b with `weight` [E, D, D] and `bias` [E, D], both from zero."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = width * width
        self.weight = nn.Parameter(torch.zeros(count, width, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def init_weights_with(self, std: float) -> None:
        for parameter in (self.weight, self.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Sum over pairs of weight * expert(hidden[token]): [T, D]."""

        def rows(inputs: Tensor, ends: Tensor) -> Tensor:
            counts = ends.diff(prepend=ends.new_zeros(1))
            return grouped_linear(inputs, self.weight, ends) + self.bias.repeat_interleave(
                counts, 0
            )

        return run_sorted(hidden, pairs, self.num_experts, rows)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight[expert], self.bias[expert])
