"""One bit a weight: its sign, times the mean absolute weight of the group.

The mean is the level that leaves the least squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.registry import register
from moekit.ops.codecs.bit_fields import pack_bits, packed_bytes, unpack_bits
from moekit.ops.codecs.codec import Encoded, Part, check_group_size, check_width, finite_half
from moekit.ops.codecs.grid import Grid, GridCodec, spread


@register(
    "codec",
    "binary",
    title="The sign of a weight times the mean of the group",
    paper="XNOR-Net (1603.05279)",
    needs=("weights",),
    options={"group_size": "columns that share a scale: 32, 64 or 128"},
)
class BinaryCodec(GridCodec):
    """Weights as -1 or 1 times one level a group."""

    tiled = True
    idempotent = True

    def __init__(self, *, group_size: int = 32) -> None:
        check_group_size(group_size)
        self.group_size = group_size

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        check_width(shape, self.group_size)
        groups = (shape[0], shape[1] // self.group_size)
        size = packed_bytes(self.group_size, 1)
        return (
            (
                Part("payload", (*groups, size), torch.uint8),
                Part("scale", groups, torch.float16),
            ),
        )

    def fit(self, grouped: Tensor, shrink: float = 1.0) -> Grid:
        return {"scale": finite_half(grouped.abs().mean(-1))}

    def nearest(self, values: Tensor, grid: Grid) -> Tensor:
        return (values >= 0).int()

    def level(self, codes: Tensor, grid: Grid) -> Tensor:
        return (codes.float() * 2 - 1) * grid["scale"].float()

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"payload": pack_bits(codes, 1), **grid}

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        plane = encoded.planes[0]
        codes = unpack_bits(plane["payload"], 1, self.group_size)
        return self.level(codes, spread({"scale": plane["scale"]})).flatten(1).to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        scale = encoded.planes[0]["scale"].float().repeat_interleave(self.group_size, 1)
        # Encoding takes the nearer of -scale and scale.
        return (weight.float().abs() - scale).abs() + 2**-25
