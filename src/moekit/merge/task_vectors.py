"""One kernel for merging by task vectors: sparsify, weigh, elect signs, combine, scale.

W = W0 + scale * combine(weight_i * sparsify(W_i - W0)), tensor by tensor and within a tensor block
by block of rows. The published methods are settings of it (`presets`). Shape letters: N models, R
rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.merge.consensus import Consensus
from moekit.merge.sparsify import Blocks, Density, rule_for, sparsified

# Divisors nearer to zero than this are taken as one, as mergekit does.
SMALLEST_DIVISOR = 1e-8


@dataclass(frozen=True)
class Settings:
    """What tells one task-vector method from another; numbers are defaults that recipes override.

    `sparsifier`: None, magnitude, band, random, magprune. `rescale`: none, inverse, l1.
    `consensus`: how signs are elected, if at all. `normalize` divides by the weights that count.
    `whole_model`: the magnitudes of the whole model compete, not those of each tensor.
    """

    sparsifier: str | None = None
    rescale: str = "none"
    consensus: Consensus | None = None
    normalize: bool = False
    scale: float = 1.0
    density: Density = field(default_factory=Density)
    whole_model: bool = False


@dataclass(frozen=True)
class Part:
    """One model's part in the merge of one tensor."""

    tensor: Any
    weight: float
    density: Density


def merge_rows(
    settings: Settings,
    base: Any,
    parts: Sequence[Part],
    *,
    generator: Callable[[int], torch.Generator],
    block_rows: int,
    zero_sign: int = 1,
    thresholds: Sequence[Any] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(row, merged rows) of one tensor, in order.

    `base` and the parts' tensors are `Deferred`s or tensors of one shape. Arithmetic is in the
    dtype of `base`, as mergekit's is. `generator(i)` is a fresh generator for model i, the same
    each time. `thresholds` replace the rules of this tensor where the whole model competes.
    """
    rows = base.shape[0] if base.ndim else 1
    streams = [
        _sparse_stream(settings, base, part, number, generator, block_rows, thresholds)
        for number, part in enumerate(parts)
    ]
    for start in range(0, rows, block_rows):
        below = read_rows(base, start, min(start + block_rows, rows))
        values = torch.stack([next(stream) for stream in streams])
        merged = combine(settings, values, [part.weight for part in parts], zero_sign)
        yield start, (below + merged).to(below.dtype)


def combine(
    settings: Settings, values: Tensor, weights: Sequence[float], zero_sign: int = 1
) -> Tensor:
    """The mixed task vector of sparsified ones [N, R, ...], before it is added to the base."""
    factors = torch.tensor(weights, dtype=values.dtype).view(-1, *[1] * (values.ndim - 1))
    weighted = values * factors
    consensus = settings.consensus
    if consensus is None:
        mixed = weighted.sum(dim=0)
        divisor = factors.sum()
        if settings.normalize and abs(float(divisor)) >= SMALLEST_DIVISOR:
            mixed = mixed / divisor
    else:
        mask = consensus.agreeing(weighted, consensus.elect(weighted, zero_sign))
        mixed = (weighted * mask).sum(dim=0)
        if consensus.mean:
            mixed = mixed / mask.sum(dim=0).clamp(min=1).to(mixed.dtype)
        elif settings.normalize:
            divisor = (factors * mask).sum(dim=0)
            mixed = mixed / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return mixed if settings.scale == 1 else mixed * settings.scale


def read_rows(tensor: Any, start: int, stop: int) -> Tensor:
    """Rows of a tensor or `Deferred`; a scalar is one row."""
    if tensor.ndim == 0:
        return tensor.read() if hasattr(tensor, "read") else tensor
    return tensor.rows(start, stop) if hasattr(tensor, "rows") else tensor[start:stop]


def task_vector_blocks(base: Any, tensor: Any, block_rows: int) -> Blocks:
    """Blocks of W_i - W0 in the dtype of the base, as often as they are asked for."""
    rows = base.shape[0] if base.ndim else 1

    def blocks() -> Iterator[Tensor]:
        for start in range(0, rows, block_rows):
            stop = min(start + block_rows, rows)
            below = read_rows(base, start, stop)
            yield read_rows(tensor, start, stop).to(below.dtype) - below

    return blocks


def _sparse_stream(
    settings: Settings,
    base: Any,
    part: Part,
    number: int,
    generator: Callable[[int], torch.Generator],
    block_rows: int,
    thresholds: Sequence[Any] | None,
) -> Iterator[Tensor]:
    blocks = task_vector_blocks(base, part.tensor, block_rows)
    if settings.sparsifier is None:
        return blocks()
    if thresholds is not None:
        return sparsified(thresholds[number], blocks, settings.rescale)
    entries = base.numel()
    rule = rule_for(settings.sparsifier, part.density, entries, lambda: generator(number))
    return sparsified(rule, blocks, settings.rescale)
