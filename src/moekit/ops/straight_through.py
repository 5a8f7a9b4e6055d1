"""Rounding in the forward pass that the backward pass does not see (straight-through estimator).

The levels are those of BitNet b1.58 (arXiv 2402.17764): ternary weights, 8-bit inputs.
Shapes: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDING_EPS = 1e-5


class _StraightThrough(torch.autograd.Function):
    """`rounded` in the forward pass; its gradient is given to `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def ternary_weight(weight: Tensor) -> Tensor:
    """Matrices [..., O, D], each as -g, 0 or g with g its own mean absolute weight.

    The gradient passes as if nothing had been rounded.
    """
    with torch.no_grad():
        scale = weight.abs().mean((-2, -1), keepdim=True)
        levels = (weight / (scale + ROUNDING_EPS)).round().clamp(-1, 1) * scale
    return _StraightThrough.apply(weight, levels)


def int8_rows(x: Tensor) -> Tensor:
    """Rows [T, D] in 8-bit steps of their largest value; the gradient passes unchanged."""
    with torch.no_grad():
        step = x.abs().amax(-1, keepdim=True).clamp(min=ROUNDING_EPS) / 127
        levels = (x / step).round().clamp(-128, 127) * step
    return _StraightThrough.apply(x, levels)
