"""Codecs that give each group of columns a few levels, its grid, and each weight one of them.

What a grid codec adds to a codec are the steps of encoding, one by one, for methods that choose the
grid or the codes otherwise than by rounding to nearest. Shapes: O output rows, N groups a row, G
columns a group; leading axes are free.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from moekit.ops.codecs.codec import Codec, check_width

Grid = dict[str, Tensor]


class GridCodec(Codec):
    """A codec whose encoding is `fit`, then `nearest`, then `pack`.

    `can_shrink` says whether `fit` heeds `shrink`, so that a smaller range may be searched for.
    """

    group_size: int
    can_shrink = False

    @abstractmethod
    def fit(self, grouped: Tensor, shrink: float = 1.0) -> Grid:
        """The parameters [...] of the grids of float32 groups [..., G], as they are stored.

        `shrink` scales the range that the levels span. Raises `UserError` for weights that are too
        large for float16.
        """

    @abstractmethod
    def nearest(self, values: Tensor, grid: Grid) -> Tensor:
        """The code of the level nearest to each value [...]; the grid's arrays broadcast to it."""

    @abstractmethod
    def level(self, codes: Tensor, grid: Grid) -> Tensor:
        """The float32 value of each code [...]."""

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The arrays of a matrix from its codes [O, N, G] and grids [O, N]."""

    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        check_width((rows.shape[0], rows.shape[1]), self.group_size)
        grouped = rows.unflatten(1, (-1, self.group_size))
        grid = self.fit(grouped)
        return (self.pack(self.nearest(grouped, spread(grid)), grid),)


def spread(grid: Grid) -> Grid:
    """Grids [...] with one more axis, to broadcast over the columns of a group."""
    return {name: values[..., None] for name, values in grid.items()}
