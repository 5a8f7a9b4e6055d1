"""Three levels a weight, five weights a byte: {-s, 0, s} or {low, 0, high} for each group.

The levels are the best in the least-squares sense. Of n weights that share a level, keeping the k
largest at their mean removes (their sum)**2 / k of the squared error, so the best k is found from
running sums; the two signs are independent unless they share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.registry import register_preset
from moekit.ops.codecs.codec import Encoded, Part, check_group_size, check_width, finite_half
from moekit.ops.codecs.grid import Grid, GridCodec, spread
from moekit.ops.codecs.groups import GROUP_OPTION

TRITS = 5
_POWERS = torch.tensor([3**i for i in range(TRITS)], dtype=torch.int32)


class TernaryCodec(GridCodec):
    """Weights as -1, 0 or 1 times one level a group, or with levels of their own for each sign."""

    tiled = True
    idempotent = True

    def __init__(self, *, two_levels: bool = False, group_size: int = 32) -> None:
        check_group_size(group_size)
        self.two_levels = two_levels
        self.group_size = group_size

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        check_width(shape, self.group_size)
        groups = (shape[0], shape[1] // self.group_size)
        payload = Part("payload", (*groups, -(-self.group_size // TRITS)), torch.uint8)
        names = ("low", "high") if self.two_levels else ("scale",)
        return ((payload, *(Part(name, groups, torch.float16) for name in names)),)

    def fit(self, grouped: Tensor, shrink: float = 1.0) -> Grid:
        # The level is the best there is, which leaves nothing to shrink.
        if self.two_levels:
            low = _best_level(grouped.clamp(max=0).neg())
            return {"low": -low, "high": _best_level(grouped.clamp(min=0))}
        return {"scale": _best_level(grouped.abs())}

    def nearest(self, values: Tensor, grid: Grid) -> Tensor:
        low, high = _levels(grid)
        # A level that is rounded to zero is none.
        up, down = (values > high / 2) & (high > 0), (values < low / 2) & (low < 0)
        return 1 + up.int() - down.int()

    def level(self, codes: Tensor, grid: Grid) -> Tensor:
        low, high = _levels(grid)
        return torch.where(codes == 2, high, torch.where(codes == 0, low, 0.0))

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"payload": pack_trits(codes), **grid}

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        plane = encoded.planes[0]
        grid = {name: values for name, values in plane.items() if name != "payload"}
        codes = unpack_trits(plane["payload"], self.group_size)
        return self.level(codes, spread(grid)).flatten(1).to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        # Nearest of the three levels, up to the rounding of the level: half a level for weights in
        # between, the distance to the level for those beyond.
        grid = {name: v for name, v in encoded.planes[0].items() if name != "payload"}
        low, high = (level.abs() for level in _levels(spread(grid)))
        grouped = weight.float().unflatten(1, (-1, self.group_size))
        level = torch.where(grouped < 0, low, high)
        absolute = grouped.abs()
        slack = absolute.amax(-1, keepdim=True) * 2**-11 + 2**-25
        return (torch.maximum(level / 2, absolute - level) + slack).flatten(1)


def _levels(grid: Grid) -> tuple[Tensor, Tensor]:
    """The low and the high level."""
    if "low" in grid:
        return grid["low"].float(), grid["high"].float()
    scale = grid["scale"].float()
    return -scale, scale


def _best_level(magnitudes: Tensor) -> Tensor:
    """The level [...] (float16) that the largest of the magnitudes [..., G] >= 0 should share."""
    sums = magnitudes.sort(dim=-1, descending=True).values.double().cumsum(-1)
    counts = torch.arange(1, magnitudes.shape[-1] + 1, dtype=torch.float64)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    return finite_half((sums.gather(-1, best) / (best + 1)).squeeze(-1))


def pack_trits(digits: Tensor) -> Tensor:
    """Digits 0, 1, 2 [..., G] to bytes: five of them are a number in base three.

    As in `bit_fields`, byte j of B holds the digits j, j + B, j + 2B, ..., lowest first.
    """
    missing = -digits.shape[-1] % TRITS
    padded = torch.nn.functional.pad(digits.int(), (0, missing))
    return (padded.unflatten(-1, (TRITS, -1)) * _POWERS[:, None]).sum(-2).to(torch.uint8)


def unpack_trits(packed: Tensor, group_size: int) -> Tensor:
    """The digits [..., G] of bytes made by `pack_trits`."""
    digits = packed.int()[..., None, :] // _POWERS[:, None] % 3
    return digits.flatten(-2)[..., :group_size]


register_preset(
    TernaryCodec,
    "ternary",
    kind="codec",
    title="-1, 0 or 1 times the best scale a group",
    paper="TWN (1605.04711)",
    needs=("weights",),
    options=(GROUP_OPTION,),
    settings={"two_levels": False},
)
register_preset(
    TernaryCodec,
    "ternary-zp",
    kind="codec",
    title="The best low, zero and high a group",
    paper="QMoE (2310.16795)",
    needs=("weights",),
    options=(GROUP_OPTION,),
    settings={"two_levels": True},
)
