"""What a codec is: a weight matrix to packed bytes and back, row by row, in groups along the input.

Shapes: O output rows, I input columns, G columns a group, N = I / G groups a row, T tokens.
Rows are encoded independently, so a block of rows gives the same bytes as the whole matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.core.errors import UserError

GROUP_SIZES = (32, 64, 128)
# Rows are encoded in blocks of so many elements: the work arrays are several times as large.
BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Part:
    """One array of an encoded matrix: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Encoded:
    """A matrix of `shape` [O, I] as arrays by name, for each plane; one plane unless nested."""

    shape: tuple[int, int]
    planes: tuple[dict[str, Tensor], ...]

    def prefix(self, planes: int) -> Encoded:
        """The first `planes` planes only."""
        return Encoded(self.shape, self.planes[:planes])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for plane in self.planes for part in plane.values())


class Codec(ABC):
    """Encodes matrices [O, I]; `num_planes` counts the refinements plus one.

    `idempotent` says whether encoding the decoded matrix gives the same bytes again, `tiled`
    whether packed records hold the arrays in tiles (`ops.codecs.tiles`).
    """

    num_planes = 1
    idempotent = False
    tiled = False

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        """The arrays of each plane for a matrix of `shape`, each with O as its first axis.

        Raises `UserError` for a shape that the codec cannot hold.
        """

    @abstractmethod
    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        """Encode finite float32 rows whose width fits."""

    @abstractmethod
    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, I] of those planes that `encoded` has."""

    @abstractmethod
    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        """The largest error that each element of decode(encode(weight)) may have, [O, I]."""

    def encode(self, weight: Tensor) -> Encoded:
        """Encode a floating-point matrix [O, I], block of rows by block of rows.

        Raises `UserError` for values that are not finite and shapes that the codec cannot hold.
        """
        if weight.ndim != 2:
            raise UserError(f"A codec encodes matrices; this has shape {list(weight.shape)}.")
        outputs, inputs = weight.shape
        layout = self.layout((outputs, inputs))
        made = tuple(
            {p.name: torch.empty(p.shape, dtype=p.dtype) for p in plane} for plane in layout
        )
        step = max(1, BLOCK_ELEMENTS // max(1, inputs))
        for start in range(0, outputs, step):
            rows = weight[start : start + step].float()
            if not bool(torch.isfinite(rows).all()):
                bad = int((~torch.isfinite(rows)).sum())
                raise UserError(
                    f"{bad} of the weights in rows {start} to {start + len(rows) - 1} are NaN or "
                    "infinite; such a matrix cannot be encoded."
                )
            for whole, block in zip(made, self.encode_rows(rows), strict=True):
                for name, values in block.items():
                    whole[name][start : start + len(rows)] = values
        return Encoded((outputs, inputs), made)

    def matmul(self, x: Tensor, encoded: Encoded) -> Tensor:
        """x [T, I] times the transposed matrix, [T, O] in the dtype of x: decode, then multiply."""
        return x @ self.decode(encoded, x.dtype).T

    def nbytes(self, shape: tuple[int, int], planes: int | None = None) -> int:
        """Bytes of an encoded matrix, or of its first `planes` planes."""
        return sum(part.nbytes for plane in self.layout(shape)[:planes] for part in plane)

    def bits_per_weight(self, shape: tuple[int, int], planes: int | None = None) -> float:
        """Bits stored for each weight, scales included."""
        return 8 * self.nbytes(shape, planes) / math.prod(shape)


def check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise UserError(f"group size {group_size} is not one of 32, 64 and 128.")


def check_width(shape: tuple[int, int], group_size: int) -> None:
    """Raise `UserError` unless rows split into whole groups."""
    if shape[1] % group_size:
        raise UserError(
            f"A matrix of shape {list(shape)} has {shape[1]} columns, which do not split into "
            f"groups of {group_size} ({shape[1] % group_size} left over); take a smaller group "
            "size, or a codec without groups (fp32, bf16, fp16)."
        )


def rounded_up(scale: Tensor, what: str) -> Tensor:
    """Scales rounded up to float16, so that no value lies beyond the last level."""
    rounded = scale.half()
    small = rounded.float() < scale
    rounded = torch.where(small, torch.nextafter(rounded, rounded.new_tensor(math.inf)), rounded)
    if not bool(torch.isfinite(rounded).all()):
        raise UserError(
            f"A {what} of {float(scale.max()):.3g} is beyond float16 (65504): the weights are too "
            "large for this codec; take fp32 or bf16."
        )
    return rounded


def finite_half(level: Tensor) -> Tensor:
    """Levels rounded to float16; raises `UserError` where they are beyond it."""
    rounded = level.half()
    if not bool(torch.isfinite(rounded).all()):
        raise UserError(
            f"A level of {float(level.max()):.3g} is beyond float16 (65504): the weights are too "
            "large for this codec; take fp32 or bf16."
        )
    return rounded
