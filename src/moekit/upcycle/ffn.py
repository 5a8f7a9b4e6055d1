"""Feed-forward networks that are not loaded, and what converters do to them.

Shapes: D width, F neurons. Nothing here reads a weight before the result is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.source_model import SourceModel

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class FFN:
    """gate and up [F, D] and down [D, F]; `name` keys what is random about it."""

    name: str
    gate: Deferred
    up: Deferred
    down: Deferred

    @property
    def width(self) -> int:
        return int(self.gate.shape[0])


def dense_ffn(source: SourceModel, layer: int) -> FFN:
    """The feed-forward network of a decoder layer; `UserError` where it has not three matrices."""
    found: dict[str, Deferred] = {}
    for part in PARTS:
        name = f"model.layers.{layer}.mlp.{part}_proj.weight"
        if name not in source.tensors:
            raise UserError(f"{source.name} has no tensor {name}, which becomes experts.")
        found[part] = source.tensors[name]
    return FFN(f"{source.name} layer {layer}", **found)


def neurons(ffn: FFN, order: Tensor) -> FFN:
    """The network of the neurons `order` [n] alone."""
    gate, up = (part.index_select(0, order) for part in (ffn.gate, ffn.up))
    down: Any = ffn.down.index_select(1, order)
    return FFN(ffn.name, _deferred(gate), _deferred(up), down)


def scaled(ffn: FFN, factor: float) -> FFN:
    """The network with its output times `factor`, which the down projection takes alone: its
    output is linear in that matrix and in no other."""
    if factor == 1.0:
        return ffn
    down = ffn.down

    def read(region: Region) -> Tensor:
        return (down.read(region).float() * factor).to(down.dtype)

    return FFN(ffn.name, ffn.gate, ffn.up, Deferred(down.shape, down.dtype, read))


def each(ffn: FFN, change: Callable[[str, Tensor], Tensor]) -> FFN:
    """The network with every matrix replaced by `change(part, matrix)`, taken when it is read."""
    made = {part: mapped(getattr(ffn, part), functools.partial(change, part)) for part in PARTS}
    return FFN(ffn.name, **made)


def mapped(tensor: Deferred, change: Callable[[Tensor], Tensor]) -> Deferred:
    """`change` of a tensor, of the same shape, rounded to its number format."""

    def read(region: Region) -> Tensor:
        # One matrix of one expert at a time is read whole.
        made = change(tensor.read()).to(tensor.dtype)
        return made[tuple(slice(start, stop) for start, stop in region)]

    return Deferred(tensor.shape, tensor.dtype, read)


def constant(value: Tensor) -> Deferred:
    """A tensor that is here already."""
    return Deferred(
        value.shape, value.dtype, lambda region: value[tuple(slice(a, b) for a, b in region)]
    )


def mean(tensors: list[Deferred], weights: list[float] | None = None) -> Deferred:
    """The weighted mean of tensors, summed in float32; plain without `weights`."""
    shares = weights or [1 / len(tensors)] * len(tensors)
    first = tensors[0]

    def read(region: Region) -> Tensor:
        total = torch.zeros([b - a for a, b in region])
        for tensor, share in zip(tensors, shares, strict=True):
            total += share * tensor.read(region).float()
        return total.to(first.dtype)

    return first if len(tensors) == 1 else Deferred(first.shape, first.dtype, read)


def same_shapes(name: str, tensors: Mapping[str, Deferred]) -> None:
    """Raise `UserError` with the shapes where the models' tensors differ in them."""
    shapes = {model: tuple(tensor.shape) for model, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{list(shape)} in {model}" for model, shape in shapes.items())
        raise UserError(f"{name} has different shapes: {told}. Experts must be of one shape.")


def _deferred(tensor: Any) -> Deferred:
    assert isinstance(tensor, Deferred)
    return tensor
