"""Ternary experts: weights of three values and inputs of 8 bits, trained through the rounding.

MoTE, arXiv 2506.14435, with the rounding of BitNet b1.58. Meant beside a shared expert of full
precision.

Shapes: D width, F expert width, E experts, n rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.registry import register
from moekit.ops.straight_through import int8_rows, ternary_weight

from ..compute import grouped_linear, run_sorted
from ..routing import Pairs
from .ffn import SwiGLUExperts


@register(
    "expert",
    "ternary",
    title="Gated experts with weights of three values and 8-bit inputs",
    paper="MoTE, arXiv:2506.14435",
    needs=("training",),
    limits="Trained through the rounding; stored here in full precision.",
    options={
        "expert_width": "width F between the two products",
        "zero_down": "the experts add nothing at the start (a model grown from a dense one)",
    },
)
class TernaryExperts(SwiGLUExperts):
    """`SwiGLUExperts` whose gate, up and down are rounded, each by its own scale, in every pass.

    The gradient of a weight is that of its rounded value.
    """

    def __init__(
        self, width: int, count: int, *, expert_width: int, zero_down: bool = False
    ) -> None:
        self.zero_down = zero_down
        super().__init__(width, count, expert_width=expert_width)

    def init_weights_with(self, std: float) -> None:
        super().init_weights_with(std)
        if self.zero_down:
            nn.init.zeros_(self.down_proj)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """`gate_up_proj` and `down_proj` as -g, 0 or g, with one g a matrix."""
        gate_up = ternary_weight(self.gate_up_proj.unflatten(1, (2, -1))).flatten(1, 2)
        return gate_up, ternary_weight(self.down_proj)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        gate_up, down = self.rounded()

        def rows(inputs: Tensor, ends: Tensor) -> Tensor:
            gate, up = grouped_linear(int8_rows(inputs), gate_up, ends).chunk(2, -1)
            return grouped_linear(int8_rows(F.silu(gate) * up), down, ends)

        return run_sorted(hidden, pairs, self.num_experts, rows)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        gate_up, down = (weight[expert] for weight in self.rounded())
        gate, up = F.linear(int8_rows(rows), gate_up).chunk(2, -1)
        return F.linear(int8_rows(F.silu(gate) * up), down)
