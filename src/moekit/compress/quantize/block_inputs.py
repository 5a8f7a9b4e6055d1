"""A sample of what the experts of each layer get, for searches that run them again.

Shapes: T tokens, D width, K choices, C choices of a layer, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.core.collect import Batch, collect
from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.view import MoEView

DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class BlockInputs:
    """Tokens of one layer: hidden [T, D], ids and weights [T, K], all float32 but the ids.

    `logits` [T, C] where the router shows them.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    logits: Tensor | None

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows [n] of `hidden` that chose an expert, and their gate weights [n]."""
        tokens, choices = (self.ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, choices]


class _Sample:
    """A sink that keeps the first tokens of every layer."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: dict[int, list[BlockInputs]] = {}
        self.held: dict[int, int] = {}

    def start(self, view: MoEView) -> None: ...

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None:
        position = call.layer.position
        room = self.limit - self.held.get(position, 0)
        kept = torch.ones(len(call.hidden), dtype=torch.bool)
        if call.mask is not None:
            kept = call.mask.bool().cpu()
        rows = kept.nonzero().flatten()[:room]
        if len(rows):
            logits = None if call.logits is None else call.logits.cpu()[rows].float()
            part = BlockInputs(
                call.hidden.cpu()[rows].float(),
                call.ids.cpu()[rows],
                call.weights.cpu()[rows].float(),
                logits,
            )
            self.parts.setdefault(position, []).append(part)
            self.held[position] = self.held.get(position, 0) + len(rows)

    def end_batch(self) -> None: ...

    def close(self) -> None: ...


def block_inputs(
    view: MoEView, batches: Iterable[Batch | Tensor], max_tokens: int = DEFAULT_TOKENS
) -> list[BlockInputs]:
    """What the experts of every layer get from the first `max_tokens` tokens of `batches`.

    Needs T * D numbers for each layer. Raises `UserError` where no token reaches a layer.
    """
    sample = _Sample(max_tokens)
    logits = all(layer.router_weight is not None for layer in view)
    collect(view, _until(batches, max_tokens), [sample], logits=logits)
    for layer in view:
        if layer.position not in sample.parts:
            raise UserError(f"{layer.name} got no token; give more text.")
    return [_joined(sample.parts[layer.position]) for layer in view]


def _until(batches: Iterable[Batch | Tensor], tokens: int) -> Iterable[Batch | Tensor]:
    """As many batches as hold so many tokens."""
    seen = 0
    for batch in batches:
        if seen >= tokens:
            return
        yield batch
        mask = None if isinstance(batch, Tensor) else batch.mask
        ids = batch if isinstance(batch, Tensor) else batch.ids
        seen += ids.numel() if mask is None else int(mask.sum())


def _joined(parts: list[BlockInputs]) -> BlockInputs:
    logits = [part.logits for part in parts if part.logits is not None]
    return BlockInputs(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat(logits) if logits else None,
    )
