"""The experts of one layer, run with other weights than the model's.

Shapes: n tokens, D width, F expert width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.profile.experts_run import runs_choices


def middle_of(layer: MoELayer, expert: ExpertWeights, hidden: Tensor) -> Tensor:
    """The input [n, F] of the down projection for hidden [n, D], by the layer's own activation.

    Raises `UserError` for a family that runs its experts outside of a fused bank.
    """
    if runs_choices(layer) or expert.up is None:
        raise UserError(
            f"{type(layer).__name__} runs its experts by code of its own, so they cannot be tried "
            "with other weights; take rtn or gptq."
        )
    dtype = hidden.dtype
    up = _linear(hidden, expert.up, expert.up_bias, dtype)
    gate = None if expert.gate is None else _linear(hidden, expert.gate, expert.gate_bias, dtype)
    return gated(layer, gate, up)


def gated(layer: MoELayer, gate: Tensor | None, up: Tensor) -> Tensor:
    """The input [n, F] of the down projection from what gate and up gave, both [n, F]."""
    experts: Any = layer.experts
    if gate is None:
        return experts.act_fn(up)
    if not hasattr(experts, "_apply_gate"):
        return experts.act_fn(gate) * up
    if getattr(experts, "is_concatenated", True):
        return experts._apply_gate(torch.cat([gate, up], dim=-1))
    return experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def output_of(layer: MoELayer, expert: ExpertWeights, middle: Tensor) -> Tensor:
    """The output [n, D] of an expert, without its gate weight, from middle [n, F]."""
    out = _linear(middle, expert.down, expert.down_bias, middle.dtype)
    experts: Any = layer.experts
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
    return functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
