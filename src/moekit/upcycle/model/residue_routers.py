"""The routers of residues: one for whole examples, in front of the model, and one a layer.

Shapes: B sequences, S positions, T tokens, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

POOLS = ("prefix", "sequence")


class ExampleRouter(nn.Module):
    """Weights of the experts from the mean of the shared model's last hidden states, by an MLP.

    `pool` "sequence" takes the mean over all tokens of a sequence, as Twin-Merging does, and gives
    every token the same gates; "prefix" takes for each token the mean up to it, which no later
    token changes.
    """

    def __init__(self, width: int, num_experts: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.layers = nn.Sequential(
            *_stage(width, 2 * width),
            *_stage(2 * width, 2 * width),
            nn.Linear(2 * width, num_experts),
        )

    def pooled(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Means [B, S, D] ("prefix") or [B, 1, D] of hidden states [B, S, D]; `mask` [B, S]."""
        kept = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
        summed, count = hidden * kept[..., None], kept
        if self.pool == "sequence":
            return summed.sum(1, keepdim=True) / count.sum(1, keepdim=True)[..., None].clamp(min=1)
        return summed.cumsum(1) / count.cumsum(1)[..., None].clamp(min=1)

    def logits(self, means: Tensor) -> Tensor:
        """Logits [N, E] of means [N, D]."""
        return self.layers(means)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gates, [B, S, E] or [B, 1, E], of hidden states [B, S, D]; they sum to 1."""
        means = self.pooled(hidden, mask)
        logits = self.logits(means.flatten(0, 1)).float()
        return logits.softmax(-1).view(*means.shape[:2], -1)


class TokenRouter(nn.Module):
    """Softmax [T, E] of a linear router whose experts but the first have a bias of at most 0.

    The bias keeps a domain expert from being chosen more often than the shared block was trained
    to leave room for (FlexOlmo).
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts - 1))

    def forward(self, rows: Tensor) -> Tensor:
        logits = nn.functional.linear(rows, self.weight).float()
        bias = self.bias.clamp(max=0).float()
        return (logits + torch.cat([bias.new_zeros(1), bias])).softmax(-1).to(rows.dtype)


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(), nn.Dropout(0.5)]
