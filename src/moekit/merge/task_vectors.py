"""One kernel for merging by task vectors: sparsify, weigh, elect signs, combine, scale.

W = W0 + scale * combine(weight_i * sparsify(W_i - W0)), tensor by tensor and within a tensor block
by block of rows. The published methods are settings of it (`presets`). Shape letters: N models, R
rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.merge.consensus import Consensus
from moekit.merge.magnitude import Blocks
from moekit.merge.sparsify import Density, rule_for, sparsified

# Divisors nearer to zero than this are taken as one, as mergekit does.
SMALLEST_DIVISOR = 1e-8
# A tensor of all models together that is read once; a larger one is read again for each pass.
HELD_BYTES = 640 * 2**20


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
    base, vectors = _held(base, [part.tensor for part in parts], block_rows)
    streams = [
        _sparse_stream(settings, base, part, blocks, partial(generator, number), rule)
        for number, (part, blocks, rule) in enumerate(
            zip(parts, vectors, thresholds or [None] * len(parts), strict=True)
        )
    ]
    for start in range(0, rows, block_rows):
        below = read_rows(base, start, min(start + block_rows, rows))
        values = [next(stream) for stream in streams]
        merged = combine(settings, values, [part.weight for part in parts], zero_sign)
        yield start, (below + merged).to(below.dtype)


def combine(
    settings: Settings, values: Sequence[Tensor], weights: Sequence[float], zero_sign: int = 1
) -> Tensor:
    """The mixed task vector of N sparsified ones [R, ...], before it is added to the base.

    Rounded to the dtype of `values` where arithmetic in it would round, but computed in float32:
    16-bit comparisons and sums are several times as slow.
    """
    dtype = values[0].dtype
    factors = torch.tensor(weights, dtype=dtype).tolist()
    weighted = [
        _rounded(value.float() * factor, dtype)
        for value, factor in zip(values, factors, strict=True)
    ]
    consensus = settings.consensus
    if consensus is None:
        mixed = _rounded(_sum(weighted), dtype)
        divisor = float(torch.tensor(factors, dtype=dtype).sum())
        if settings.normalize and abs(divisor) >= SMALLEST_DIVISOR:
            mixed = _rounded(mixed / divisor, dtype)
    else:
        elected = consensus.elect(weighted, zero_sign)
        agreeing = [(value * elected).clamp_(min=0) for value in weighted]
        mixed = _rounded(_sum(agreeing) * elected, dtype)
        if consensus.mean:
            count = _sum([value.sign() for value in agreeing])
            mixed = _rounded(mixed / count.clamp_(min=1), dtype)
        elif settings.normalize:
            counted = [v.sign() * f for v, f in zip(agreeing, factors, strict=True)]
            total = _rounded(_sum(counted), dtype)
            # One where it is zero, without a comparison.
            total += 1 - total.sign().abs()
            mixed = _rounded(mixed / total, dtype)
    return (mixed if settings.scale == 1 else mixed * settings.scale).to(dtype)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0] + 0.0
    for value in values[1:]:
        total += value
    return total


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype == torch.float32 else values.to(dtype).float()


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


def _held(base: Any, tensors: Sequence[Any], block_rows: int) -> tuple[Any, list[Blocks]]:
    """The base and the blocks of every task vector: read once where they are small enough."""
    size = base.numel() * base.dtype.itemsize * (len(tensors) + 1)
    if size > HELD_BYTES:
        return base, [task_vector_blocks(base, tensor, block_rows) for tensor in tensors]
    whole = base.read() if hasattr(base, "read") else base
    vectors = [list(task_vector_blocks(whole, tensor, block_rows)()) for tensor in tensors]
    return whole, [partial(iter, held) for held in vectors]


def _sparse_stream(
    settings: Settings,
    base: Any,
    part: Part,
    blocks: Blocks,
    generator: Callable[[], torch.Generator],
    threshold: Any,
) -> Iterator[Tensor]:
    if settings.sparsifier is None:
        return blocks()
    rule = threshold
    if rule is None:
        rule = rule_for(settings.sparsifier, part.density, base.numel(), generator)
    return sparsified(rule, blocks, settings.rescale)
