"""Activations by name, with their derivatives.

Shapes: any, elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`forward(x)` and `backward(grad, x)`, the gradient of x for that of the result."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    share = torch.sigmoid(1.702 * x)
    return grad * (share + 1.702 * x * share * (1 - share))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": Activation(F.relu, lambda grad, x: grad * (x > 0)),
    "relu2": Activation(lambda x: F.relu(x) ** 2, lambda grad, x: grad * (2 * F.relu(x))),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_backward),
}
