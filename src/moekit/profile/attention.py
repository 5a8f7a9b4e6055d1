"""Attention weights of a running forward, for measures and rules that need them.

Shapes: B sequences, H heads, S tokens, P tokens with those of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.layer import MoELayer
from moekit.profile.residual import decoder_layer


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Run attention as plain matrix products: other implementations do not return its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class AttentionTap:
    """Watches the attention of every decoder layer; `take(layer)` gives its weights [B, H, S, P].

    None where a layer showed none: it has no attention, or one that keeps its weights.
    """

    def __init__(self, model: nn.Module, layers: Iterable[MoELayer]) -> None:
        self._made: dict[int, Tensor] = {}
        self._handles = [
            module.register_forward_hook(self._noting(layer.position))
            for layer in layers
            for module in decoder_layer(model, layer).modules()
            if "attention" in type(module).__name__.lower()
        ]

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._made.clear()

    def take(self, layer: MoELayer) -> Tensor | None:
        """The weights of the attention that ran before this layer's experts, once."""
        return self._made.pop(layer.position, None)

    def _noting(self, position: int) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            for part in output if isinstance(output, tuple) else ():
                if isinstance(part, Tensor) and part.dim() == 4:
                    self._made[position] = part

        return note


def attention_received(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean attention that every token gets from itself and later ones, summed over heads: [B, S].

    `weights` [B, H, S, P]; `mask` [B, S] is False at padding, which neither asks nor counts.
    """
    length = weights.shape[2]
    own = weights[..., -length:].float().sum(1)
    asking = torch.ones(own.shape[:2], device=own.device) if mask is None else mask.float()
    total = torch.einsum("bi,bij->bj", asking, own)
    later = asking.flip(1).cumsum(1).flip(1)
    return total / later.clamp(min=1)
