"""MoTE: ternary routed experts beside the dense feed-forward block they grew from.

y = FFN(x) + p_i(x) E_i(x), i the likeliest expert of the router's softmax and p_i its probability.
While they are trained the experts keep their full-precision weights, rounded in every forward
pass; packed, they are five weights a byte and one scale a matrix. (MoTE, arXiv 2506.14435; the
rounding is BitNet b1.58's.)

Shapes: T tokens, D width, F expert width, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moekit.ops.codecs.ternary import TRITS, pack_trits, unpack_trits
from moekit.ops.straight_through import int8_rows, ternary_weight
from moekit.upcycle.model.blocks import mlp_blocks


class TernaryPart(nn.Module):
    """Puts E ternary experts beside the feed-forward block of the layers it is told.

    Options of the config's part: `layers`, their numbers, and `packed` (default False).
    """

    def __init__(self, base: PreTrainedModel, config: Any) -> None:
        super().__init__()
        packed = bool(config.part.get("packed", False))
        for block in mlp_blocks(base):
            if block.index in config.part["layers"]:
                block.replace(TernaryBlock(config.experts_config, block.module, packed))

    def begin(self, inputs: Any) -> None:
        """Nothing to do before the base model runs."""


class TernaryBlock(nn.Module):
    """The dense block, and the likeliest of E ternary experts by its probability."""

    def __init__(self, config: Any, dense: nn.Module, packed: bool) -> None:
        super().__init__()
        self.gate = Qwen3MoeTopKRouter(config)
        self.experts = PackedTernaryExperts(config) if packed else TernaryExperts(config)
        self.shared_expert = dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        _, weights, ids = self.gate(rows)
        routed = self.experts(rows, ids, weights).view_as(hidden_states)
        return self.shared_expert(hidden_states) + routed


class TernaryExperts(nn.Module):
    """E gated experts with full-precision weights that count as ternary; inputs are 8 bits.

    Called as every bank of experts is: hidden [T, D], ids [T, 1], weights [T, 1] give [T, D].
    """

    # How a bank lies in memory, in the words of transformers' own.
    is_concatenated = True
    is_transposed = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, width = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.zeros(self.num_experts, 2 * width, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate and up [2, F, D], and down [D, F], as they count."""
        gate_up = self.gate_up_proj[expert].unflatten(0, (2, -1))
        return ternary_weight(gate_up), ternary_weight(self.down_proj[expert])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            gate_up, down = self.matrices(expert)
            x = int8_rows(hidden_states[token])
            inner = self.act_fn(linear(x, gate_up[0])) * linear(x, gate_up[1])
            out = linear(int8_rows(inner), down) * top_k_weights[token, choice, None]
            total = total.index_add(0, token, out.to(total.dtype))
        return total


class PackedTernaryExperts(TernaryExperts):
    """The same experts as codes: five weights a byte, one scale a matrix; not to be trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        for name, (experts, rows, columns) in shapes.items():
            delattr(self, name)
            parts = 2 if name == "gate_up_proj" else 1
            codes = torch.zeros(experts, rows, math.ceil(columns / TRITS), dtype=torch.uint8)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", torch.zeros(experts, parts))
        self._columns = {name: shape[2] for name, shape in shapes.items()}

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        gate_up, down = (self._decode(name, expert) for name in self._columns)
        return gate_up, down[0]

    def _decode(self, name: str, expert: int) -> Tensor:
        """The matrices [P, O, I] that lie behind one another in a bank."""
        codes, scale = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale")[expert]
        signs = unpack_trits(codes[expert], self._columns[name]) - 1
        return signs.unflatten(0, (len(scale), -1)).to(scale.dtype) * scale[:, None, None]


def pack_matrices(weights: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Codes [E, O, ...] and scales [E, `parts`] of a bank [E, O, I] of `parts` matrices each.

    What `ternary_weight` makes of them, exactly up to the format of the scale.
    """
    levels = ternary_weight(weights.unflatten(1, (parts, -1)))
    signs = levels.sign().flatten(1, 2)
    # A matrix of zeros has no level; its scale says nothing.
    return pack_trits(signs.int() + 1), levels.abs().amax((-2, -1))
