"""Formats of matrices for the kernels, from their codecs and where their arrays begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.ops.codecs.binary import BinaryCodec
from moekit.ops.codecs.bit_fields import fields, packed_bytes
from moekit.ops.codecs.codec import Codec, Encoded
from moekit.ops.codecs.groups import GroupCodec
from moekit.ops.codecs.memory import lay_out
from moekit.ops.codecs.nested import NestedCodec
from moekit.ops.codecs.plain import PlainCodec
from moekit.ops.codecs.ternary import TernaryCodec
from moekit.ops.native.structures import (
    ACTIVATIONS,
    BF16,
    F16,
    F32,
    GROUPS,
    MAX_FIELDS,
    TRITS,
    ExpertFormat,
    Field,
    Format,
)

KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
# For each plane of a matrix, array name -> bytes from the base at which it begins.
Offsets = Sequence[Mapping[str, int]]
# Entries of the table of a field.
LUT = 32


def plain_format(shape: tuple[int, int], dtype: torch.dtype, offset: int = 0) -> Format:
    """A row-major matrix [rows, cols] of float32, bfloat16 or float16."""
    return Format(kind=KINDS[dtype], rows=shape[0], cols=shape[1], data=offset)


def matrix_format(codec: Codec, shape: tuple[int, int], offsets: Offsets) -> Format | None:
    """A matrix whose arrays lie in tiles (`ops.codecs.tiles`); None for a codec without kernels.

    `offsets` may have fewer planes than the codec.
    """
    if isinstance(codec, PlainCodec):
        return plain_format(shape, codec.dtype, offsets[0]["payload"])
    if isinstance(codec, NestedCodec):
        made = _group_fields(codec.base, offsets[0])
        size = packed_bytes(codec.group_size, 1)
        for plane in offsets[1:]:
            made.append(_field(plane["sign"], plane["scale"], -1, size, 0, 1, (-1, 1)))
    elif isinstance(codec, BinaryCodec):
        size, at = packed_bytes(codec.group_size, 1), offsets[0]
        made = [_field(at["payload"], at["scale"], -1, size, 0, 1, (-1, 1))]
    elif type(codec) is TernaryCodec:
        made = _ternary_fields(codec, offsets[0])
    elif isinstance(codec, GroupCodec):
        made = _group_fields(codec, offsets[0])
    else:
        return None
    if len(made) > MAX_FIELDS:
        return None
    return Format(
        kind=GROUPS,
        rows=shape[0],
        cols=shape[1],
        group=codec.group_size,
        num_fields=len(made),
        fields=(Field * MAX_FIELDS)(*made),
    )


def _group_fields(codec: GroupCodec, offsets: Mapping[str, int]) -> list[Field]:
    """One field for each run of bits; of a byte, one for each half."""
    stride = packed_bytes(codec.group_size, codec.bits)
    # What a code of zero is worth belongs to the first field alone.
    least = 0 if codec.zero_point else -(2 ** (codec.bits - 1))
    zero = offsets["zero"] if codec.zero_point else -1
    made, first, bit = [], 0, 0
    for width in fields(codec.bits):
        for shift in (0, 4) if width == 8 else (0,):
            step, levels = 2 ** (bit + shift), 2 ** min(width, 4)
            values = tuple(least + step * code for code in range(levels))
            made.append(
                _field(
                    offsets["payload"], offsets["scale"], zero, stride, first, width, values, shift
                )
            )
            least, zero = 0, -1
        first += packed_bytes(codec.group_size, width)
        bit += width
    return made


def _ternary_fields(codec: TernaryCodec, offsets: Mapping[str, int]) -> list[Field]:
    """The codes once for each level, if there are two."""
    levels = {"low": (1, 0, 0), "high": (0, 0, 1)} if codec.two_levels else {"scale": (-1, 0, 1)}
    size = -(-codec.group_size // TRITS)
    return [
        _field(offsets["payload"], offsets[name], -1, size, 0, TRITS, values)
        for name, values in levels.items()
    ]


def _field(
    codes: int,
    scale: int,
    zero: int,
    stride: int,
    first: int,
    width: int,
    values: tuple[int, ...],
    shift: int = 0,
) -> Field:
    table = torch.tensor(values, dtype=torch.bfloat16).repeat(-(-LUT // len(values)))[:LUT]
    made = Field(
        codes=codes, scale=scale, zero=zero, stride=stride, first=first, width=width, shift=shift
    )
    made.lut[:] = [bits & 0xFFFF for bits in table.view(torch.int16).tolist()]
    return made


def in_memory(codec: Codec, encoded: Encoded) -> tuple[Format, Tensor] | None:
    """An encoded matrix as the kernels read it: its format and the bytes it counts from.

    None for a codec without kernels.
    """
    offsets, memory = lay_out(codec, encoded)
    made = matrix_format(codec, encoded.shape, offsets)
    return None if made is None else (made, memory)


def expert_format(
    matrices: Mapping[str, Format],
    activation: str,
    *,
    alpha: float = 0.0,
    limit: float = 0.0,
    biases: Mapping[str, int] | None = None,
    bias_dtype: torch.dtype = torch.float32,
) -> ExpertFormat:
    """An expert of the matrices "gate" (or none), "up" and "down".

    `activation` is one of `ACTIVATIONS`, `alpha` and `limit` are those of clamped_swiglu; `biases`
    maps "gate_bias", "up_bias" and "down_bias" to bytes from the base.
    """
    biases = biases or {}
    gate = matrices.get("gate")
    if activation == "clamped_swiglu" and gate is None:
        raise ValueError("clamped_swiglu needs a gate")
    return ExpertFormat(
        gate=gate if gate is not None else Format(),
        up=matrices["up"],
        down=matrices["down"],
        has_gate=gate is not None,
        activation=ACTIVATIONS.index(activation),
        alpha=alpha,
        limit=limit,
        bias_kind=KINDS[bias_dtype],
        **{name: biases.get(name, -1) for name in ("gate_bias", "up_bias", "down_bias")},
    )
