"""Three levels for a whole row: its least weight, zero, and its largest (QMoE, 2310.16795).

With the levels at the ends of the range most weights are nearest to zero, which costs accuracy and
makes the codes compressible (`ops.pair_dictionary`). Shapes: O output rows, I columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.registry import register
from moekit.ops.codecs.codec import Encoded, Part, finite_half
from moekit.ops.codecs.grid import Grid, spread
from moekit.ops.codecs.ternary import TRITS, TernaryCodec, unpack_trits


@register(
    "codec",
    "ternary-rows",
    title="The least, zero or the largest weight of a row",
    paper="QMoE (2310.16795)",
    needs=("weights",),
    limits="Made for gptq: rounding to nearest alone makes most weights zero.",
)
class TernaryRowsCodec(TernaryCodec):
    """Codes 0, 1, 2 for low, zero and high; the group is the whole row."""

    def __init__(self) -> None:
        self.two_levels = True
        self.group_size = 0

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        rows = (shape[0], 1)
        payload = Part("payload", (*rows, -(-shape[1] // TRITS)), torch.uint8)
        return ((payload, *(Part(name, rows, torch.float16) for name in ("low", "high"))),)

    def fit(self, grouped: Tensor, shrink: float = 1.0) -> Grid:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        return {"low": -finite_half(-low), "high": finite_half(high)}

    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        grouped = rows[:, None]
        grid = self.fit(grouped)
        return (self.pack(self.nearest(grouped, spread(grid)), grid),)

    def codes(self, encoded: Encoded) -> Tensor:
        """The codes [O, I]: 0 for low, 1 for zero, 2 for high."""
        return unpack_trits(encoded.planes[0]["payload"], encoded.shape[1])[:, 0]

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        plane = encoded.planes[0]
        grid = {"low": plane["low"], "high": plane["high"]}
        return self.level(self.codes(encoded), grid).to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        plane = encoded.planes[0]
        level = torch.where(weight.float() < 0, plane["low"].float().abs(), plane["high"].float())
        # Half a level in between; beyond it only by the level's own rounding.
        return level / 2 + weight.float().abs() * 2**-11 + 2**-25
