"""What the cache of a sequence takes, measured on a few tokens with the experts left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from moekit.core.view import MoEView

# Layers that hold the same for each token, or for none. Others may gather tokens and compress them
# in blocks: they are measured over more tokens, and the steepest part counts.
_EVEN = {
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
}
_SHORT, _LONG = (2, 4), (8, 72, 136)


@dataclass(frozen=True)
class CacheSize:
    """For each part of a cache: bytes a token, bytes however long, and the window (0: none)."""

    parts: tuple[tuple[float, float, int], ...]

    @property
    def per_token(self) -> int:
        """Bytes that one more token takes while no window is full."""
        return round(sum(slope for slope, _, _ in self.parts))

    def nbytes(self, tokens: int) -> int:
        """Bytes of the cache of a sequence of `tokens` tokens."""
        held = (
            fixed + slope * (min(tokens, window) if window else tokens)
            for slope, fixed, window in self.parts
        )
        return round(sum(held))

    @property
    def largest(self) -> tuple[float, float, int]:
        """The part that takes most for each token."""
        return max(self.parts, default=(0.0, 0.0, 0))


@torch.inference_mode()
def measure_cache(model: PreTrainedModel, new_cache: Callable[[], Any]) -> CacheSize:
    """Run a few tokens through `model` without its experts and see what its cache holds."""
    view = MoEView(model)
    first = new_cache()
    even = type(first) is DynamicCache and {type(layer) for layer in first.layers} <= _EVEN

    def filled(tokens: int) -> list[tuple[int, int]]:
        with view.use_backend(_nothing):
            output = model(
                input_ids=torch.ones(1, tokens, dtype=torch.long, device=model.device),
                past_key_values=new_cache(),
                use_cache=True,
            )
        cache = output.past_key_values
        layers = cache.layers if even else [cache]
        return [
            (sum(_tensor_bytes(layer)), getattr(layer, "sliding_window", 0) or 0)
            for layer in layers
        ]

    lengths = _SHORT if even else _LONG
    measured = [filled(length) for length in lengths]
    return CacheSize(tuple(_line(lengths, parts) for parts in zip(*measured, strict=True)))


def _line(lengths: Sequence[int], measured: Sequence[tuple[int, int]]) -> tuple[float, float, int]:
    """Slope, offset and window of a line that no measured size is above."""
    sizes = [size for size, _ in measured]
    points = list(zip(lengths, sizes, strict=True))
    slope = max((b - a) / (n - m) for (m, a), (n, b) in pairwise(points))
    fixed = max(size - slope * length for length, size in points)
    return slope, max(0.0, fixed), measured[0][1]


def _nothing(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def _tensor_bytes(holder: Any) -> Iterator[int]:
    """Bytes of all tensors below an object, however it keeps them."""
    if isinstance(holder, Tensor):
        yield holder.nbytes
    elif isinstance(holder, dict):
        for value in holder.values():
            yield from _tensor_bytes(value)
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from _tensor_bytes(value)
    elif type(holder).__module__.startswith("transformers") and hasattr(holder, "__dict__"):
        yield from _tensor_bytes(vars(holder))
