"""An expert as its neurons: what alignment, recombination and Fisher information work on.

Shapes: F neurons, D width, P numbers of a neuron. A neuron is its gate row, its up row and its down
column, with its entries of the gate and up biases where the family has them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moekit.core.expert_weights import ExpertWeights

# The parts that have an entry for every neuron, in the order of `neuron_rows`.
PARTS = ("gate", "up", "down", "gate_bias", "up_bias")


def neuron_rows(expert: ExpertWeights, *, gate: bool = True) -> Tensor:
    """The neurons of an expert, [F, P] in float32, without the gate's part if asked."""
    parts = expert.tensors()
    if not gate and expert.up is not None:
        parts = {name: part for name, part in parts.items() if not name.startswith("gate")}
    return torch.cat([_by_neuron(name, parts[name]) for name in PARTS if name in parts], dim=1)


def from_rows(rows: Tensor, like: ExpertWeights, down_bias: Tensor | None = None) -> ExpertWeights:
    """The expert with neurons `rows` [F, P], with the parts and number formats of `like`.

    `down_bias` [D] belongs to no neuron; without it that of `like` stays.
    """
    parts = like.tensors()
    names = [name for name in PARTS if name in parts]
    sizes = [_by_neuron(name, parts[name]).shape[1] for name in names]
    made = {}
    for name, piece in zip(names, rows.split(sizes, dim=1), strict=True):
        shaped = piece.T if name == "down" else piece[:, 0] if name.endswith("bias") else piece
        made[name] = shaped.to(parts[name].dtype).contiguous()
    if down_bias is not None and like.down_bias is not None:
        made["down_bias"] = down_bias.to(like.down_bias.dtype)
    return replace(like, **made)


def _by_neuron(name: str, part: Tensor) -> Tensor:
    part = part.float()
    return part.T if name == "down" else part if part.ndim == 2 else part.unsqueeze(1)
