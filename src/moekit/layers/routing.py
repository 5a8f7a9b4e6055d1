"""`Routing`: what one router decided for one batch, the record that everything else reads.

Losses, metrics and dispatch are pure functions of it, so that any of them works with any router.

Shapes: T tokens, U units (what gets one decision: a token, a segment, ...), E experts, N pairs of a
token and an expert, M pairs lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Ragged pairs: `token` int64 [N], `expert` int64 [N] and `weight` [N]."""

    token: Tensor
    expert: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Routing:
    """The decision of a router about T tokens and E experts. Nothing in it is detached.

    The pairs `token`, `expert` and `weight` [N] are sorted by token, and the pairs of a token by
    preference, first choice first. `top_k` is set where every token has exactly so many pairs, and
    only then. `logits` and `scores` [U, E] are what the choice was made of, before terms that act
    on the selection alone; None where a router has none. `dropped` [M, 2] holds token and expert
    of the pairs that a capacity lost. `token_mask` [T] is False for padding, which never counts.
    `unit_of_token` [T] says which row of `logits` a token was routed by; None: its own. `cost` [E]
    is the work of an expert (multiply-adds a row; 0 for zero and copy experts). `round` numbers
    several decisions of one layer. `extra` holds what one router's own losses need.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int
    top_k: int | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    dropped: Tensor | None = None
    token_mask: Tensor | None = None
    unit_of_token: Tensor | None = None
    cost: Tensor | None = None
    layer: int = 0
    round: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_topk(cls, ids: Tensor, weights: Tensor, num_experts: int, **fields: object) -> Routing:
        """The record of a dense choice: `ids` and `weights` [T, K], best first."""
        num_tokens, top_k = ids.shape
        token = torch.arange(num_tokens, device=ids.device).repeat_interleave(top_k)
        return cls(
            token,
            ids.reshape(-1),
            weights.reshape(-1),
            num_tokens,
            num_experts,
            top_k=top_k,
            **fields,  # type: ignore[arg-type]
        )

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.token, self.expert, self.weight)

    @property
    def num_dropped(self) -> int:
        return 0 if self.dropped is None else self.dropped.shape[0]

    @property
    def num_real_tokens(self) -> Tensor | int:
        """Tokens that are not padding."""
        return self.num_tokens if self.token_mask is None else self.token_mask.sum()

    def topk(self) -> tuple[Tensor, Tensor]:
        """Ids and weights as dense [T, K]; ValueError where tokens differ in their pairs."""
        if self.top_k is None:
            raise ValueError("this routing is ragged: its tokens differ in their number of experts")
        shape = (self.num_tokens, self.top_k)
        return self.expert.view(shape), self.weight.view(shape)

    def rank(self) -> Tensor:
        """Of every pair, which choice of its token it is: int64 [N], 0 for the first."""
        count = self.token.shape[0]
        place = torch.arange(count, device=self.token.device)
        per_token = torch.bincount(self.token, minlength=self.num_tokens)
        return place - (per_token.cumsum(0) - per_token)[self.token]

    def counts(self) -> Tensor:
        """Pairs that each expert computes, padding left out: float32 [E], without a gradient."""
        return self._count(self.token, self.expert)

    def wanted(self) -> Tensor:
        """Pairs of each expert before any was dropped: float32 [E], without a gradient."""
        counts = self.counts()
        if self.dropped is not None:
            counts = counts + self._count(self.dropped[:, 0], self.dropped[:, 1])
        return counts

    def unit_mask(self) -> Tensor | None:
        """Which rows of `logits` hold a token that is not padding [U]; None: all."""
        if self.token_mask is None or self.unit_of_token is None:
            return self.token_mask
        rows = self.logits if self.logits is not None else self.scores
        units = rows.shape[0] if rows is not None else int(self.unit_of_token.max()) + 1
        real = torch.zeros(units, dtype=torch.int64, device=self.token_mask.device)
        return real.index_add(0, self.unit_of_token, self.token_mask.long()) > 0

    def _count(self, token: Tensor, expert: Tensor) -> Tensor:
        ones = torch.ones(expert.shape, device=expert.device)
        if self.token_mask is not None:
            ones = self.token_mask[token].to(ones.dtype)
        return torch.zeros(self.num_experts, device=expert.device).index_add(0, expert, ones)
