"""Scaling the channels inside of an expert: its input, and the middle between up and down.

Shapes: D width, F expert width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moekit.core.expert_weights import ExpertWeights


@dataclasses.dataclass(frozen=True)
class ChannelScales:
    """What the columns of gate and up are multiplied by, `inputs` [D], and those of down,
    `middle` [F], for which the rows of up are divided; None for ones."""

    inputs: Tensor | None = None
    middle: Tensor | None = None

    def apply(self, expert: ExpertWeights) -> ExpertWeights:
        """The scaled expert, in float32; itself where nothing is scaled."""
        if self.inputs is None and self.middle is None:
            return expert
        parts = {name: part.float() for name, part in expert.tensors().items()}
        if self.inputs is not None:
            for name in ("gate", "up"):
                if name in parts:
                    parts[name] = parts[name] * self.inputs
        if self.middle is not None:
            parts["up"] = parts["up"] / self.middle[:, None]
            parts["down"] = parts["down"] * self.middle
            if "up_bias" in parts:
                parts["up_bias"] = parts["up_bias"] / self.middle
        return dataclasses.replace(expert, **parts)


def middle_can_be_scaled(experts: Any) -> bool:
    """Whether scaling the up part of a fused bank scales the input of its down projection.

    It does where the activation is on the gate alone. Not where there is no gate, or where the up
    part is clamped or shifted (gpt_oss). Works on the meta device, for only the module's own gate
    function is run.
    """
    if not getattr(experts, "has_gate", True):
        return False
    size = 8
    generator = torch.Generator().manual_seed(0)
    gate, up = (4 * torch.randn(16, size, generator=generator) for _ in range(2))

    def middle(up: Tensor) -> Tensor:
        if getattr(experts, "is_concatenated", True):
            both = torch.cat([gate, up], dim=-1)
        else:
            both = torch.stack([gate, up], dim=-1).flatten(-2)
        if hasattr(experts, "_apply_gate"):
            return experts._apply_gate(both)
        first, second = both.chunk(2, dim=-1)
        return experts.act_fn(first) * second

    # Large enough that a clamp of any family cuts.
    return torch.allclose(middle(100 * up), 100 * middle(up), rtol=1e-4, atol=1e-4)
