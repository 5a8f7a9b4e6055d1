"""Arrays of an integer codec in tiles of rows, the order in which vector instructions want them.

Shapes: O rows, N groups a row, B bytes of codes a group. Codes [O, N, B] become
[O / 64, N, B / 4, 64, 4] and scales [O, N] become [O / 64, N, 64], rows padded with zeros to whole
tiles. So a vector of 64 bytes has four bytes of each of 16 rows, four of them that do not wait for
each other follow one another, and a tile is read from its first byte to its last, which is what the
prefetchers of a processor are made for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moekit.ops.codecs.codec import Part

TILE_ROWS = 64
# Bytes of codes that lie together for a row.
WORD = 4


def tiled_shape(part: Part) -> tuple[int, ...]:
    """The shape of a part in tiles."""
    outputs, groups, *size = part.shape
    tiles = -(-outputs // TILE_ROWS)
    if not size:
        return (tiles, groups, TILE_ROWS)
    if size[0] % WORD:
        return (tiles, groups, TILE_ROWS * size[0])
    return (tiles, groups, size[0] // WORD, TILE_ROWS, WORD)


def tiled_nbytes(part: Part) -> int:
    """Bytes of a part in tiles."""
    return math.prod(tiled_shape(part)) * part.dtype.itemsize


def tile(array: Tensor) -> Tensor:
    """Codes [O, N, B] or scales [O, N] in tiles."""
    missing = -len(array) % TILE_ROWS
    if missing:
        array = torch.cat([array, array.new_zeros(missing, *array.shape[1:])])
    tiles = array.unflatten(0, (-1, TILE_ROWS)).movedim(1, 2)
    if array.ndim == 2:
        return tiles.contiguous()
    if array.shape[2] % WORD == 0:
        return tiles.unflatten(-1, (-1, WORD)).transpose(2, 3).contiguous()
    return torch.cat([piece.flatten(2) for piece in tiles.split(_pieces(array.shape[2]), -1)], -1)


def untile(tiles: Tensor, part: Part) -> Tensor:
    """What `tile` was given, with the shape of `part`."""
    if tiles.ndim == 5:
        tiles = tiles.transpose(2, 3).flatten(-2)
    elif len(part.shape) == 3:
        sizes = _pieces(part.shape[2])
        pieces = tiles.split([TILE_ROWS * size for size in sizes], -1)
        tiles = torch.cat([piece.unflatten(-1, (TILE_ROWS, -1)) for piece in pieces], -1)
    return tiles.movedim(2, 1).flatten(0, 1)[: part.shape[0]].contiguous()


def _pieces(size: int) -> list[int]:
    """Bytes of a row that lie together, where they are no whole number of words."""
    rest = [piece for piece in (2, 1) if size % WORD & piece]
    return [*[WORD] * (size // WORD), *rest]
