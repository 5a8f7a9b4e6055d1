"""Nested bit planes: a low-bit base, and planes of one more bit each that refine it (D2MoE).

A plane holds the sign of what is still missing, and for each group the mean of its absolute value,
which is the step that leaves the least squared error. Any prefix of the planes is a valid matrix,
and exactly the one that the codec of so many bits would have made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.registry import register_preset
from moekit.ops.codecs.bit_fields import pack_bits, packed_bytes, unpack_bits
from moekit.ops.codecs.codec import Codec, Encoded, Part
from moekit.ops.codecs.groups import GROUP_OPTION, GroupCodec

BASE_BITS = 2


class NestedCodec(Codec):
    """A base of 2 bits with zero points, and `bits` - 2 planes of signs."""

    tiled = True

    def __init__(self, *, bits: int, group_size: int = 32) -> None:
        self.base = GroupCodec(bits=BASE_BITS, zero_point=True, group_size=group_size)
        self.bits = bits
        self.group_size = group_size
        self.num_planes = 1 + bits - BASE_BITS

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        base = self.base.layout(shape)
        groups = (shape[0], shape[1] // self.group_size)
        plane = (
            Part("sign", (*groups, packed_bytes(self.group_size, 1)), torch.uint8),
            Part("scale", groups, torch.float16),
        )
        return (*base, *[plane] * (self.num_planes - 1))

    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        planes = list(self.base.encode_rows(rows))
        shape = (rows.shape[0], rows.shape[1])
        missing = (rows - self.base.decode(Encoded(shape, tuple(planes)))).unflatten(
            1, (-1, self.group_size)
        )
        while len(planes) < self.num_planes:
            # Rounded before it is used, so that the next plane corrects the rounding as well.
            scale = missing.abs().mean(-1).half()
            plane = {"sign": pack_bits(missing >= 0, 1), "scale": scale}
            planes.append(plane)
            missing = missing - _refinement(plane, self.group_size)
        return tuple(planes)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.base.decode(encoded)
        for plane in encoded.planes[1:]:
            values = values + _refinement(plane, self.group_size).flatten(1)
        return values.to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        # Stepping by the mean towards a residual r leaves ||r| - mean|, at most the largest |r|:
        # no plane makes the worst error of a group worse. Float16 may round the mean up.
        return self.base.error_bound(weight, encoded) * (1 + 2**-11) + 2**-25


def _refinement(plane: dict[str, Tensor], group_size: int) -> Tensor:
    """What a plane adds, [O, N, G]."""
    signs = unpack_bits(plane["sign"], 1, group_size).float() * 2 - 1
    return signs * plane["scale"].float()[..., None]


for _bits in (3, 4, 5, 6):
    register_preset(
        NestedCodec,
        f"nested{_bits}",
        kind="codec",
        title=f"2 to {_bits} bits: a base and {_bits - BASE_BITS} "
        + ("plane" if _bits == 3 else "planes"),
        paper="D2MoE (2504.15299)",
        needs=("weights",),
        limits="Encoding rounds to nearest; gptq has the paper's error feedback. Decoded weights "
        "encoded again give another base.",
        options=(GROUP_OPTION,),
        settings={"bits": _bits},
    )
