"""Integers with one scale for each group of columns, rounded to nearest.

Symmetric: w = s * (q - 2**(bits - 1)) with as many levels below zero as above it. With a zero
point: w = s * (q - z), z an integer level, so that the levels span the group's own range (which
always includes zero). The scale is rounded up, so no weight lies beyond the last level and the
error is at most half a step everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.registry import Option, register_preset
from moekit.ops.codecs.bit_fields import pack_bits, packed_bytes, unpack_bits
from moekit.ops.codecs.codec import Encoded, Part, check_group_size, check_width, rounded_up
from moekit.ops.codecs.grid import Grid, GridCodec, spread

GROUP_OPTION = Option("group_size", "int", "columns that share a scale: 32, 64 or 128", 32)


class GroupCodec(GridCodec):
    """Integers of `bits` bits with a float16 scale, and with a byte of zero point if asked for."""

    tiled = True
    can_shrink = True

    def __init__(self, *, bits: int, zero_point: bool = False, group_size: int = 32) -> None:
        check_group_size(group_size)
        self.bits = bits
        self.zero_point = zero_point
        self.group_size = group_size
        # Rounding the zero point can leave the last level unused; then the next range is smaller.
        self.idempotent = not zero_point

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        check_width(shape, self.group_size)
        groups = (shape[0], shape[1] // self.group_size)
        size = packed_bytes(self.group_size, self.bits)
        parts = [
            Part("payload", (*groups, size), torch.uint8),
            Part("scale", groups, torch.float16),
        ]
        if self.zero_point:
            parts.append(Part("zero", groups, torch.uint8))
        return (tuple(parts),)

    def fit(self, grouped: Tensor, shrink: float = 1.0) -> Grid:
        top = 2**self.bits - 1
        if not self.zero_point:
            largest = grouped.abs().amax(-1) * shrink
            return {"scale": rounded_up(largest / (2 ** (self.bits - 1) - 1), "scale")}
        low = grouped.amin(-1).clamp(max=0) * shrink
        high = grouped.amax(-1).clamp(min=0) * shrink
        scale = rounded_up((high - low) / top, "scale")
        zero = torch.round(-low / _divisor(scale)).clamp(0, top)
        return {"scale": scale, "zero": zero.to(torch.uint8)}

    def nearest(self, values: Tensor, grid: Grid) -> Tensor:
        levels = torch.round(values / _divisor(grid["scale"]) + self._zero(grid))
        return levels.clamp(0, 2**self.bits - 1)

    def level(self, codes: Tensor, grid: Grid) -> Tensor:
        return (codes.float() - self._zero(grid)) * grid["scale"].float()

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"payload": pack_bits(codes, self.bits), **grid}

    def _zero(self, grid: Grid) -> Tensor | float:
        return grid["zero"].float() if self.zero_point else float(2 ** (self.bits - 1))

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        plane = encoded.planes[0]
        grid = {name: values for name, values in plane.items() if name != "payload"}
        codes = unpack_bits(plane["payload"], self.bits, self.group_size)
        return self.level(codes, spread(grid)).flatten(1).to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        scale = encoded.planes[0]["scale"].float()
        return (scale / 2).repeat_interleave(self.group_size, 1)


def _divisor(scale: Tensor) -> Tensor:
    """Scales to divide by: a group of zeros has none, and any will do."""
    values = scale.float()
    return torch.where(values == 0, 1.0, values)


for _bits in (8, 4, 3, 2):
    register_preset(
        GroupCodec,
        f"int{_bits}",
        kind="codec",
        title=f"{_bits}-bit integers with a scale a group, symmetric",
        needs=("weights",),
        limits="Has 3 levels; int2-zp has 4." if _bits == 2 else "",
        options=(GROUP_OPTION,),
        settings={"bits": _bits},
    )
    register_preset(
        GroupCodec,
        f"int{_bits}-zp",
        kind="codec",
        title=f"{_bits}-bit integers with a scale and a zero point a group",
        needs=("weights",),
        limits="Encoding decoded weights again may choose another scale.",
        options=(GROUP_OPTION,),
        settings={"bits": _bits, "zero_point": True},
    )
