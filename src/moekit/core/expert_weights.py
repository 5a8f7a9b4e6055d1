"""One expert's matrices in one orientation, read from and written into fused banks.

Shapes: E experts, D width, F expert width. A bank stores `gate_up_proj` [E, 2F, D] and `down_proj`
[E, D, F], either of them transposed, gate and up one after the other or interleaved row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.ops.experts_naive import oriented


@dataclass
class ExpertWeights:
    """The matrices of one expert: gate and up [F, D], down [D, F], biases [F], [F] and [D].

    What the family does not have is None; only vitpose_backbone has no `up`.
    """

    gate: Tensor | None
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts that exist, by name."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def clone(self) -> ExpertWeights:
        """Return a copy that shares no memory."""
        return replace(self, **{name: part.clone() for name, part in self.tensors().items()})


def bank_views(experts: Any, e: int) -> ExpertWeights:
    """Return expert `e` of a fused bank as views into its parameters; writing changes the model."""
    gated = getattr(experts, "has_gate", True)
    biased = getattr(experts, "has_bias", False)
    interleaved = not getattr(experts, "is_concatenated", True)
    name = "gate_up_proj" if gated else "up_proj"
    gate, up = _halves(oriented(experts, name, e).detach(), gated, interleaved)
    gate_bias, up_bias, down_bias = None, None, None
    if biased:
        gate_bias, up_bias = _halves(
            getattr(experts, f"{name}_bias")[e].detach(), gated, interleaved
        )
        down_bias = experts.down_proj_bias[e].detach()
    down = oriented(experts, "down_proj", e).detach()
    return ExpertWeights(gate, up, down, gate_bias, up_bias, down_bias)


def copy_into(target: ExpertWeights, source: ExpertWeights, where: str) -> None:
    """Copy every part of `source` into the views of `target`; `where` names the expert in errors.

    Raises UserError when the parts or their shapes differ. The dtype of the target stays.
    """
    into, parts = target.tensors(), source.tensors()
    if into.keys() != parts.keys():
        raise UserError(f"{where} has {', '.join(into)}; the given expert has {', '.join(parts)}.")
    for name, part in parts.items():
        if part.shape != into[name].shape:
            raise UserError(
                f"{where}: {name} is {list(into[name].shape)}, given {list(part.shape)}."
            )
    with torch.no_grad():
        for name, part in parts.items():
            into[name].copy_(part)


def _halves(tensor: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor | None, Tensor]:
    if not gated:
        return None, tensor
    if interleaved:
        return tensor[0::2], tensor[1::2]
    gate, up = tensor.chunk(2, dim=0)
    return gate, up
