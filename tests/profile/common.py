"""Small batches with padding and two domains, and comparison of statistics."""

from __future__ import annotations

import torch

from moekit.core.collect import Batch
from moekit.core.stats import ExpertStats, Lazy


def padded_batch(length: int, seed: int = 0, rows: int = 3) -> Batch:
    """Three sequences of domains a, b, a; the second is shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    return Batch(ids, mask, ["a", "b", "a"][:rows])


def batches_of() -> list[Batch]:
    """Two batches of different lengths."""
    return [padded_batch(9), padded_batch(12, seed=1)]


def values(stats: ExpertStats) -> dict[tuple[int, str], torch.Tensor]:
    """Every statistic, with NaN (what a family does not show) made comparable."""
    loaded = {k: v.load() if isinstance(v, Lazy) else v for k, v in stats.held.items()}
    return {k: v.nan_to_num(nan=-1.0) for k, v in loaded.items()}


def differences(first: ExpertStats, second: ExpertStats) -> list[tuple[int, str]]:
    """The statistics that are not equal bit by bit."""
    mine, other = values(first), values(second)
    assert mine.keys() == other.keys()
    return [key for key in mine if not torch.equal(mine[key], other[key])]
