"""Three levels a weight, five weights a byte: {-s, 0, s} or {low, 0, high} for each group.

The levels are the best in the least-squares sense. Of n weights that share a level, keeping the k
largest at their mean removes (their sum)**2 / k of the squared error, so the best k is found from
running sums; the two signs are independent unless they share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.registry import register_preset
from moekit.ops.codecs.codec import Codec, Encoded, Part, check_group_size, check_width
from moekit.ops.codecs.groups import GROUP_OPTION

TRITS = 5
_POWERS = torch.tensor([3**i for i in range(TRITS)], dtype=torch.int32)


class TernaryCodec(Codec):
    """Weights as -1, 0 or 1 times one level a group, or with levels of their own for each sign."""

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

    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        grouped = rows.unflatten(1, (-1, self.group_size))
        if self.two_levels:
            high, up = _best_level(grouped.clamp(min=0))
            low, down = _best_level(grouped.clamp(max=0).neg())
            digits = 1 + up.int() - down.int()
            return ({"payload": _pack_trits(digits), "low": -low, "high": high},)
        scale, kept = _best_level(grouped.abs())
        digits = 1 + torch.sign(grouped).int() * kept
        return ({"payload": _pack_trits(digits), "scale": scale},)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        plane = encoded.planes[0]
        digits = _unpack_trits(plane["payload"], self.group_size)
        low, high = self._levels(encoded)
        values = torch.where(digits == 2, high, torch.where(digits == 0, low, 0.0))
        return values.flatten(1).to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        # Nearest of the three levels, up to the rounding of the level: half a level for weights in
        # between, the distance to the level for those beyond.
        low, high = (level.abs() for level in self._levels(encoded))
        grouped = weight.float().unflatten(1, (-1, self.group_size))
        level = torch.where(grouped < 0, low, high)
        absolute = grouped.abs()
        slack = absolute.amax(-1, keepdim=True) * 2**-11 + 2**-25
        return (torch.maximum(level / 2, absolute - level) + slack).flatten(1)

    def _levels(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        plane = encoded.planes[0]
        if self.two_levels:
            return plane["low"].float()[..., None], plane["high"].float()[..., None]
        scale = plane["scale"].float()[..., None]
        return -scale, scale


def _best_level(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """The level [..., N] (float16) and which of the magnitudes [..., N, G] >= 0 take it."""
    ordered, order = magnitudes.sort(dim=-1, descending=True, stable=True)
    sums = ordered.double().cumsum(-1)
    counts = torch.arange(1, magnitudes.shape[-1] + 1, dtype=torch.float64)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    level = (sums.gather(-1, best) / (best + 1)).squeeze(-1).half()
    if not bool(torch.isfinite(level).all()):
        raise UserError(
            f"A level of {float(magnitudes.max()):.3g} is beyond float16 (65504): the weights are "
            "too large for this codec; take fp32 or bf16."
        )
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1]).expand_as(order)
    )
    # A level that is rounded to zero is none.
    return level, (ranks <= best) & (magnitudes > 0) & (level > 0)[..., None]


def _pack_trits(digits: Tensor) -> Tensor:
    """Digits 0, 1, 2 [..., G] to bytes: five of them are a number in base three."""
    missing = -digits.shape[-1] % TRITS
    padded = torch.nn.functional.pad(digits.int(), (0, missing))
    return (padded.unflatten(-1, (-1, TRITS)) * _POWERS).sum(-1).to(torch.uint8)


def _unpack_trits(packed: Tensor, group_size: int) -> Tensor:
    digits = packed.int()[..., None] // _POWERS % 3
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
