"""Two networks as one: units that are merged, and units of either that stay separate (PLeaS).

Shapes: n units of each network, m merged and s separate ones of each (m + s = n); the merged
network has m + 2s units: the merged ones, then the first network's, then the second's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.ops.regression import RIDGE, solved


@dataclass(frozen=True)
class Pairing:
    """Which units of two aligned networks are merged [m] and which stay separate [s]."""

    merged: Tensor
    separate: Tensor

    @classmethod
    def whole(cls, units: int) -> Pairing:
        """All units merged."""
        return cls(torch.arange(units), torch.arange(0))

    @classmethod
    def by_similarity(cls, similarity: Tensor, ratio: float) -> Pairing:
        """The share `ratio` of n pairs that are least similar [n] stays separate."""
        count = round(ratio * len(similarity))
        order = similarity.argsort(stable=True)
        return cls(order[count:].sort().values, order[:count].sort().values)

    @property
    def units(self) -> int:
        """Units of each network."""
        return len(self.merged) + len(self.separate)

    @property
    def size(self) -> int:
        """Units of the merged network."""
        return len(self.merged) + 2 * len(self.separate)

    def read(self, pair: Tensor) -> Tensor:
        """Rows of both networks, [2n, ...], as those of the merged one [m + 2s, ...]: merged units
        are the mean of the pair."""
        first, second = pair[: self.units], pair[self.units :]
        mean = (first[self.merged] + second[self.merged]) / 2
        return torch.cat([mean, first[self.separate], second[self.separate]])

    def given(self, pair: Tensor) -> Tensor:
        """Columns of both networks, [..., 2n], for inputs of the merged one [..., m + 2s]: what a
        merged unit says is read by both."""
        first, second = pair[..., : self.units], pair[..., self.units :]
        both = first[..., self.merged] + second[..., self.merged]
        return torch.cat([both, first[..., self.separate], second[..., self.separate]], dim=-1)


def merged_matrix(
    first: Tensor,
    second: Tensor,
    rows: Pairing,
    columns: Pairing,
    moment: Tensor | None,
    ridge: float = RIDGE,
) -> Tensor:
    """The matrix of the merged network from two aligned ones [O, D] (2407.02447).

    It starts as the blocks of both (merged units averaged) and is fitted to give, from the merged
    inputs, the merged outputs that both give from their own: least squares with a ridge towards the
    start, in closed form. `moment` [2D, 2D] are the products of the two networks' inputs on the
    same tokens; None leaves the start. Separate outputs must not meet separate inputs of the other
    network, so one of the two pairings merges everything. Raises ValueError where neither does.
    """
    if len(rows.separate) and len(columns.separate):
        raise ValueError("either the outputs or the inputs must all be merged")
    width = first.shape[1]
    pair = torch.zeros(2 * len(first), 2 * width, dtype=torch.float64)
    pair[: len(first), :width], pair[len(first) :, width:] = first.double(), second.double()
    outputs = rows.read(pair)
    start = columns.given(outputs)
    if moment is None:
        return start.to(first.dtype)
    seen = columns.read(moment.double())
    cross = outputs @ seen.T
    return solved(columns.read(seen.T), cross, start, ridge).to(first.dtype)
