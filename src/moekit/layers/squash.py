"""From router logits [U, E] to scores [U, E]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Probabilities over all experts."""
    return logits.softmax(-1)


def identity(logits: Tensor) -> Tensor:
    """The logits themselves, as with cosine scores; weights may then be negative."""
    return logits


SQUASH: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "identity": identity,
}
