"""A smaller range than that of the weights, where rounding most of them better is worth clipping.

Shapes: G columns a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.ops.codecs.codec import Codec, Encoded
from moekit.ops.codecs.grid import Grid, GridCodec, spread


def searched_fit(
    codec: GridCodec,
    grouped: Tensor,
    *,
    reach: float = 0.1,
    steps: int = 50,
    norm: float = 2.4,
    importance: Tensor | None = None,
) -> Grid:
    """The grids of groups [..., G] whose range, shrunk by up to `reach`, leaves the least error.

    The error of a group is the sum of |difference|^`norm`, each column times `importance`, which
    broadcasts to the groups (MC-MoE 2410.06270: 2.4 and a tenth in 50 steps). A codec whose range
    cannot shrink gives its plain fit.
    """
    best = codec.fit(grouped)
    if not codec.can_shrink or reach <= 0:
        return best
    least = _loss(codec, grouped, best, norm, importance)
    for step in range(1, steps + 1):
        grid = codec.fit(grouped, shrink=1 - reach * step / steps)
        loss = _loss(codec, grouped, grid, norm, importance)
        better = loss < least
        least = torch.where(better, loss, least)
        best = {name: torch.where(better, grid[name], best[name]) for name in best}
    return best


def searched_encode(codec: Codec, weight: Tensor, reach: float) -> Encoded:
    """A matrix [O, I] rounded to nearest on searched grids; plainly where there is no range."""
    if reach <= 0 or not isinstance(codec, GridCodec) or not codec.can_shrink:
        return codec.encode(weight)
    grouped = weight.float().unflatten(1, (-1, codec.group_size))
    grid = searched_fit(codec, grouped, reach=reach)
    plane = codec.pack(codec.nearest(grouped, spread(grid)), grid)
    return Encoded((weight.shape[0], weight.shape[1]), (plane,))


def rounded(codec: Codec, weight: Tensor, reach: float = 0.0) -> Tensor:
    """What decoding `searched_encode` gives, float32, without packing where that can be spared."""
    if not isinstance(codec, GridCodec):
        return codec.decode(codec.encode(weight))
    width = codec.group_size or weight.shape[-1]
    grouped = weight.float().unflatten(-1, (-1, width))
    grid = spread(searched_fit(codec, grouped, reach=reach))
    return codec.level(codec.nearest(grouped, grid), grid).flatten(-2)


def _loss(
    codec: GridCodec, grouped: Tensor, grid: Grid, norm: float, importance: Tensor | None
) -> Tensor:
    columns = spread(grid)
    error = (codec.level(codec.nearest(grouped, columns), columns) - grouped).abs() ** norm
    return (error if importance is None else error * importance).sum(-1)
