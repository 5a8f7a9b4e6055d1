"""Hash routing: the experts of a token are a fixed function of its id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..router import Choice, PipelineRouter
from ..select import TopK
from ..squash import identity

# Odd multipliers of the splitmix64 mixing function, as signed 64-bit numbers.
_MIX = (-4658895280553007687, -7723592293110705685)


class HashScore(nn.Module):
    """A number that looks random for every token id, expert and layer; nothing is learned."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        if context.token_id is None:
            raise UserError("router 'hash' routes by token id, which this model does not hand on")
        expert = torch.arange(self.num_experts, device=key.device)
        value = (context.token_id[:, None] * self.num_experts + expert) * 2654435761
        value = value + context.layer * 40503
        for factor in _MIX:
            value = (value ^ (value >> 30)) * factor
        return (value >> 40).float()


class EqualWeights:
    """1 / K for each of K chosen experts."""

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        assert choice.top_k is not None
        return scores.new_full((len(choice.unit),), 1 / choice.top_k)


@register(
    "router",
    "hash",
    title="Experts by a fixed hash of the token's id, equal weights",
    paper="Hash Layers, arXiv:2106.04426",
    needs=("training",),
    limits="Learns nothing; needs token ids.",
)
def hash_router(width: int, num_experts: int, top_k: int) -> nn.Module:
    """Each token id gets `top_k` experts, drawn anew in every layer and never changed."""
    return PipelineRouter(
        num_experts,
        score=HashScore(num_experts),
        squash=identity,
        select=TopK(top_k),
        weigh=EqualWeights(),
    )
