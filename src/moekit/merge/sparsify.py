"""Which entries of a task vector stay, and how what stays is scaled.

A rule reads the task vector once, block by block, to learn what it needs of the whole tensor
(`fit`), and is then applied block by block. Densities are the share of entries that stay; 1 or more
keeps everything as it is. Shape letters: R rows of a tensor, C entries in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.merge.magnitude import Blocks, Largest, kept, largest

# Below this sum of magnitudes a ratio of sums means nothing.
SMALLEST_SUM = 1e-7


@dataclass(frozen=True)
class Density:
    """How much stays: share `density`, MagPrune's `epsilon`, the share `gamma` of outliers."""

    density: float = 1.0
    epsilon: float = 0.15
    gamma: float = 0.01


class Rule(Protocol):
    """One way to choose; `masked` gives the mask of each block, and the keep probability."""

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        """(block, mask, probability that an entry stays) for every block, in order."""
        ...


@dataclass
class Everything:
    """Nothing is taken away."""

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        for block in blocks():
            yield block, torch.ones_like(block, dtype=torch.bool), 1.0


@dataclass
class Magnitude:
    """The largest magnitudes of the tensor (TIES, 2306.01708)."""

    density: float
    count: int
    entries: int

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        keep = largest(blocks, self.count, self.entries)
        for block in blocks():
            yield block, keep.keep(block), self.density


@dataclass
class Band:
    """Neither the largest nor the smallest magnitudes (breadcrumbs, 2312.06795)."""

    density: float
    count: int
    outliers: int
    entries: int

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        inner = largest(blocks, self.count + self.outliers, self.entries)
        outer: Largest | None = None
        if self.outliers:
            outer = largest(blocks, self.outliers, self.entries)
        for block in blocks():
            mask = inner.keep(block)
            if outer is not None:
                mask &= ~outer.keep(block)
            yield block, mask, self.density


@dataclass
class Bernoulli:
    """Entries drawn alike (DARE, 2311.03099)."""

    density: float
    generator: Callable[[], torch.Generator]

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        source = self.generator()
        for block in blocks():
            draws = torch.rand(block.shape, generator=source)
            yield block, draws < self.density, self.density


@dataclass
class MagPrune:
    """Entries drawn with a probability that rises with their rank in a row (DELLA, 2406.11617)."""

    density: float
    epsilon: float
    generator: Callable[[], torch.Generator]

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        source = self.generator()
        for block in blocks():
            rows = block.reshape(1, -1) if block.ndim < 2 else block.flatten(1)
            probability = self._probability(rows.abs()).view(block.shape)
            draws = torch.rand(block.shape, generator=source)
            yield block, draws < probability, probability

    def _probability(self, magnitudes: Tensor) -> Tensor:
        columns = magnitudes.shape[1]
        order = magnitudes.float().argsort(dim=1, stable=True)
        rank = torch.arange(columns, dtype=torch.float32).expand_as(order)
        low, span = self.density - self.epsilon, 2 * self.epsilon
        # A row of one entry has no ranks: it is drawn with the density.
        steps = rank / (columns - 1) if columns > 1 else torch.full_like(rank, 0.5)
        return torch.empty_like(rank).scatter_(1, order, low + span * steps)


def rule_for(
    name: str, share: Density, entries: int, generator: Callable[[], torch.Generator]
) -> Rule:
    """The rule called `name` for a tensor of `entries`.

    `name` is magnitude, band, random or magprune. Counts are rounded down as in mergekit, but never
    to nothing: a small tensor keeps at least one entry. Raises `UserError` for impossible shares.
    """
    if not share.density >= 0:
        raise UserError(f"density is {share.density}; it is a share of entries, from 0 to 1.")
    if share.density >= 1:
        return Everything()
    count = max(1, int(share.density * entries))
    if name == "magnitude":
        return Magnitude(share.density, min(count, entries), entries)
    if name == "band":
        return _band(share, entries, count)
    if name == "random":
        if share.density <= 0:
            raise UserError("density is 0: nothing would be left to rescale.")
        return Bernoulli(share.density, generator)
    low, high = share.density - share.epsilon, share.density + share.epsilon
    if not (low > 0 and high < 1):
        raise UserError(
            f"density {share.density} with epsilon {share.epsilon} gives probabilities from "
            f"{low:g} to {high:g}; they must lie between 0 and 1."
        )
    return MagPrune(share.density, share.epsilon, generator)


def _band(share: Density, entries: int, count: int) -> Rule:
    outliers = int(share.gamma * entries)
    bottom = entries - int(share.density * entries) - outliers
    if bottom < 0:
        outliers, bottom = max(0, outliers + bottom), 0
    kept = entries - bottom - outliers
    return Band(share.density, max(kept, 1), min(outliers, entries - 1), entries)


def sparsified(rule: Rule, blocks: Blocks, rescale: str) -> Iterator[Tensor]:
    """The blocks with what the rule takes away set to zero, and the rest scaled.

    `rescale` is none; inverse: by 1 / probability of each entry, which keeps the expectation (DARE,
    DELLA); or l1: so that the sum of magnitudes of the tensor stays (mergekit).
    """
    if isinstance(rule, Everything):
        yield from blocks()
        return
    factor = l1_factor(rule, blocks) if rescale == "l1" else None
    for block, mask, probability in rule.masked(blocks):
        rest = kept(block, mask)
        if factor is not None:
            rest = rest * factor.to(block.dtype)
        elif rescale == "inverse":
            rest = (rest / probability).to(block.dtype)
        yield rest


def l1_factor(rule: Rule, blocks: Blocks) -> Tensor:
    """Sum of magnitudes before over that after, in the dtype of the blocks; 1 where either is 0."""
    before = after = 0.0
    dtype = torch.float32
    for block, mask, _ in rule.masked(blocks):
        magnitude = block.abs().double()
        before += float(magnitude.sum())
        after += float((magnitude * mask).sum())
        dtype = block.dtype
    if before < SMALLEST_SUM or after < SMALLEST_SUM:
        return torch.ones((), dtype=dtype)
    # Both sums in that dtype first: mergekit sums there, so a 16-bit factor is rounded like this.
    return torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype)
