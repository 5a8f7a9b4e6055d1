"""An encoded matrix as bytes that kernels read: its arrays one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.ops.codecs.codec import Codec, Encoded
from moekit.ops.codecs.tiles import tile, tiled_nbytes

ALIGN = 64


def lay_out(codec: Codec, encoded: Encoded) -> tuple[list[dict[str, int]], Tensor]:
    """Where the arrays of each plane begin, and the bytes they lie in.

    They are in tiles for a codec that has them, and begin at multiples of 64, as do the bytes.
    """
    arrays, offsets, size = [], [], 0
    for plane, layout in zip(encoded.planes, codec.layout(encoded.shape), strict=False):
        places = {}
        for part in layout:
            array = plane[part.name]
            arrays.append((size, tile(array) if codec.tiled else array.contiguous()))
            places[part.name] = size
            nbytes = tiled_nbytes(part) if codec.tiled else part.nbytes
            size += -(-nbytes // ALIGN) * ALIGN
        offsets.append(places)
    memory = torch.zeros(size + ALIGN, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % ALIGN :][:size]
    for offset, array in arrays:
        raw = array.reshape(-1).view(torch.uint8)
        memory[offset : offset + len(raw)] = raw
    return offsets, memory
