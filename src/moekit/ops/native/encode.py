"""Encoding a matrix for the kernels, in C++ where that is possible."""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from typing import TypeGuard

from torch import Tensor

from moekit.core.errors import UserError
from moekit.ops.codecs.codec import Codec
from moekit.ops.codecs.groups import GroupCodec
from moekit.ops.codecs.memory import ALIGN
from moekit.ops.codecs.tiles import TILE_ROWS, tiled_nbytes
from moekit.ops.native.formats import KINDS, in_memory, matrix_format
from moekit.ops.native.library import Pool
from moekit.ops.native.structures import Format


def nbytes_in_memory(codec: Codec, shape: tuple[int, int]) -> int:
    """Bytes of a matrix of `shape` as `encode_in_memory` makes it."""
    parts = [part for plane in codec.layout(shape) for part in plane]
    sizes = [tiled_nbytes(part) if codec.tiled else part.nbytes for part in parts]
    return sum(-(-size // ALIGN) * ALIGN for size in sizes)


def encode_in_memory(pool: Pool, codec: Codec, weight: Tensor, memory: Tensor) -> Format:
    """Put what `in_memory(codec, codec.encode(weight))` gives, to the byte, into `memory`.

    `memory` are `nbytes_in_memory` bytes. Symmetric integers of 4 and 8 bits take a fraction of the
    time. Raises UserError for values that the codec cannot hold and ValueError for a codec without
    kernels.
    """
    if not has_encoder(codec):
        made = in_memory(codec, codec.encode(weight))
        if made is None:
            raise ValueError("a codec without kernels")
        memory.copy_(made[1])
        return made[0]
    shape = (weight.shape[0], weight.shape[1])
    start = -(-tiled_nbytes(codec.layout(shape)[0][0]) // ALIGN) * ALIGN
    if shape[0] % TILE_ROWS:
        memory.zero_()
    encode_tiles(pool, codec, weight, memory, memory[start:])
    format = matrix_format(codec, shape, [{"payload": 0, "scale": start}])
    assert format is not None
    return format


def has_encoder(codec: Codec) -> TypeGuard[GroupCodec]:
    """Whether `encode_tiles` knows the codec: symmetric integers of 4 and 8 bits."""
    return isinstance(codec, GroupCodec) and codec.bits in (4, 8) and not codec.zero_point


def encode_tiles(
    pool: Pool, codec: GroupCodec, weight: Tensor, codes: Tensor, scales: Tensor
) -> None:
    """Put the tiles of what `codec.encode(weight)` gives, to the byte, at the beginning of the
    bytes `codes` and `scales`; rows that fill up the last tile are not touched.

    `weight` [O, I] is float32, float16 or bfloat16. Raises UserError for values that the codec
    cannot hold.
    """
    weight = weight.contiguous()
    encode = pool.c.encode_groups
    encode.restype = c_int32
    encode.argtypes = (c_void_p, c_int32, c_void_p, *(c_int32,) * 4, c_void_p, c_void_p)
    wrong = encode(
        pool.handle,
        KINDS[weight.dtype],
        weight.data_ptr(),
        weight.shape[0],
        weight.shape[1],
        codec.group_size,
        codec.bits,
        codes.data_ptr(),
        scales.data_ptr(),
    )
    if wrong:
        codec.encode(weight)
        raise UserError("a matrix cannot be encoded")
