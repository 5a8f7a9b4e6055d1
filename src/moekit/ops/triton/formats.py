"""How the Triton kernels read a record: where its arrays begin and what their bits are worth.

A matrix is a sum of terms, scale * (step * code + least - zero), each with arrays of its own: one
for an integer codec, one a plane for a nested one. Numbers only, so a kernel is compiled for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moekit.ops.codecs.codec import Codec
from moekit.ops.codecs.groups import GroupCodec
from moekit.ops.codecs.nested import NestedCodec
from moekit.ops.codecs.plain import PlainCodec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "clamped_swiglu")
# Columns that are read at one time where a codec has no groups.
PLAIN_GROUP = 32
# For each plane of a matrix, array name -> bytes from the base at which it begins.
Offsets = Sequence[Mapping[str, int]]
# Bytes at which codes, scales and zero points (-1: none) begin; bits, step and least code.
Term = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class MatrixFormat:
    """A matrix [rows, cols] in `terms` with groups of `group` columns.

    With a `dtype` its numbers lie row by row from the first offset of its only term on.
    """

    rows: int
    cols: int
    group: int
    terms: tuple[Term, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class ExpertFormat:
    """The matrices of an expert, its activation, and where its biases begin (-1: none)."""

    gate: MatrixFormat | None
    up: MatrixFormat
    down: MatrixFormat
    activation: str
    alpha: float = 0.0
    limit: float = 0.0
    gate_bias: int = -1
    up_bias: int = -1
    down_bias: int = -1
    bias_dtype: torch.dtype = torch.float32


def matrix_format(codec: Codec, shape: tuple[int, int], offsets: Offsets) -> MatrixFormat | None:
    """A matrix of a record, or None for a codec that the kernels lack."""
    rows, cols = shape
    if isinstance(codec, PlainCodec):
        term = (offsets[0]["payload"], -1, -1, 0, 0, 0)
        return MatrixFormat(rows, cols, PLAIN_GROUP, (term,), codec.dtype)
    if isinstance(codec, NestedCodec):
        signs = [(plane["sign"], plane["scale"], -1, 1, 2, -1) for plane in offsets[1:]]
        return MatrixFormat(rows, cols, codec.group_size, (_term(codec.base, offsets[0]), *signs))
    if isinstance(codec, GroupCodec):
        return MatrixFormat(rows, cols, codec.group_size, (_term(codec, offsets[0]),))
    return None


def _term(codec: GroupCodec, offsets: Mapping[str, int]) -> Term:
    least = 0 if codec.zero_point else -(2 ** (codec.bits - 1))
    zero = offsets["zero"] if codec.zero_point else -1
    return offsets["payload"], offsets["scale"], zero, codec.bits, 1, least
