"""Feed-forward experts: gated by SiLU (SwiGLU), or two matrices with one activation between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.ops.activations import ACTIVATIONS
from moekit.ops.grouped import ragged_experts

from ..routing import Pairs


@register(
    "expert",
    "swiglu",
    title="Gated feed-forward experts",
    paper="GLU variants, arXiv:2002.05202",
    needs=("training",),
    options={"expert_width": "width F between the two products"},
)
class SwiGLUExperts(nn.Module):
    """down(silu(gate x) * up x), stored as transformers stores fused experts.

    `gate_up_proj` [E, 2F, D] with the gate first, `down_proj` [E, D, F].
    """

    def __init__(self, width: int, count: int, *, expert_width: int) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = 3 * width * expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, expert_width))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=std)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        return ragged_experts(hidden, *pairs, self.gate_up_proj, self.down_proj)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        middle = _gated(F.linear(rows, self.gate_up_proj[expert]))
        return F.linear(middle, self.down_proj[expert])


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@register(
    "expert",
    "ffn",
    title="Feed-forward experts without a gate",
    paper="Switch Transformer, arXiv:2101.03961",
    needs=("training",),
    options={
        "expert_width": "width F between the two products",
        "activation": f"one of {', '.join(ACTIVATIONS)}",
    },
)
class FFNExperts(nn.Module):
    """down(act(up x)) with `up_proj` [E, F, D] and `down_proj` [E, D, F]."""

    def __init__(
        self, width: int, count: int, *, expert_width: int, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.num_experts = count
        self.cost = 2 * width * expert_width
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.up_proj = nn.Parameter(torch.empty(count, expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, expert_width))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in (self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=std)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        return ragged_experts(
            hidden,
            *pairs,
            self.up_proj,
            self.down_proj,
            activation=self.activation,
            gated=False,
        )

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        middle = ACTIVATIONS[self.activation].forward(F.linear(rows, self.up_proj[expert]))
        return F.linear(middle, self.down_proj[expert])
