"""Small integers packed into bytes, a whole group at a time.

A width that is no power of two is split: 3 bits are a field of the lowest 2 and one of the highest.
Within a field, byte j of a group holds the values j, j + B, j + 2B, ... (B bytes in the field),
lowest bits first. So one mask and one shift give B neighbours at once, which is what vector
instructions want.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fields(bits: int) -> list[int]:
    """The widths of the fields, lowest bits first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_bytes(group_size: int, bits: int) -> int:
    """Bytes of one group."""
    return group_size * bits // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers [..., G] from 0 to 2**bits - 1 into bytes [..., G * bits / 8]."""
    made, shift = [], 0
    for width in fields(bits):
        field = (values.int() >> shift) & (2**width - 1)
        lanes = field.unflatten(-1, (8 // width, -1))
        steps = width * torch.arange(8 // width, dtype=torch.int32)
        made.append((lanes << steps[:, None]).sum(-2).to(torch.uint8))
        shift += width
    return torch.cat(made, dim=-1)


def unpack_bits(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The integers [..., G] (uint8) of bytes made by `pack_bits`."""
    values = torch.zeros(*packed.shape[:-1], group_size, dtype=torch.uint8)
    start, shift = 0, 0
    for width in fields(bits):
        size = group_size * width // 8
        field = packed[..., None, start : start + size]
        steps = width * torch.arange(8 // width, dtype=torch.uint8)
        lanes = (field >> steps[:, None]) & (2**width - 1)
        values |= lanes.flatten(-2) << shift
        start, shift = start + size, shift + width
    return values
