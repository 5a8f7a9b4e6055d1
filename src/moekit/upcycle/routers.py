"""Rows of a new router [E, D], before anything was trained."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.seeds import generator

ROUTERS = ("random", "uniform", "zero")
# The spread of the weights of transformers' own models.
STD = 0.02


def initial_rows(kind: str, count: int, width: int, seed: int, layer: int) -> Tensor:
    """`count` rows: normal with std 0.02, uniform within 1 / sqrt(D) as a linear layer's, or zero.

    Keyed by seed and layer. Raises `UserError` for an unknown kind.
    """
    if kind not in ROUTERS:
        raise UserError(f"router {kind!r} is unknown; there are {', '.join(ROUTERS)}.")
    if kind == "zero":
        return torch.zeros(count, width)
    draw = generator(seed, "router rows", layer)
    if kind == "random":
        return STD * torch.randn(count, width, generator=draw)
    return (2 * torch.rand(count, width, generator=draw) - 1) / width**0.5
