"""Null experts: a token that chooses them computes less (AdaMoE, arXiv:2406.13233).

Letters: T tokens, E experts (null ones included), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..experts.zero_computation import ZeroExperts
from ..router import Choice, PipelineRouter
from ..score import LinearScore
from ..select import TopK
from ..squash import softmax
from ..weigh import RenormalisedWeights


class RealWeights:
    """The scores of the chosen experts over the sum of those that are not null; 0 for null ones.

    The last `null` experts are null. A token that chose nothing else gets 0 from the layer.
    """

    def __init__(self, null: int) -> None:
        self.null = null
        self.renormalise = RenormalisedWeights()

    def check_pool(self, pool: Any) -> None:
        """UserError unless the last `null` experts of `pool` add nothing."""
        types = [type(bank) for bank in pool.banks for _ in range(bank.num_experts)]
        if any(kind is not ZeroExperts for kind in types[len(types) - self.null :]):
            raise UserError(
                f"null is {self.null}, but the last {self.null} experts of the pool are not all "
                "of type zero"
            )

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        real = torch.arange(scores.shape[1], device=scores.device) < scores.shape[1] - self.null
        return self.renormalise(scores * real, choice, context)


@register(
    "router",
    "adamoe",
    title="Top-k over real and null experts, weights renormalised over the real ones",
    paper="AdaMoE, arXiv:2406.13233",
    needs=("training",),
    limits="The pool must end with the null experts: a bank of type zero with as many.",
    options={"null": "null experts, the last of the pool; top_k counts them"},
)
def null_expert_router(width: int, num_experts: int, top_k: int, *, null: int) -> nn.Module:
    """A softmax router of `num_experts` experts of which the last `null` add nothing.

    On average a token computes `top_k` * (1 - `null` / `num_experts`) experts at balance.
    """
    check_null(null, num_experts)
    return PipelineRouter(
        num_experts,
        score=LinearScore(width, num_experts),
        squash=softmax,
        select=TopK(top_k),
        weigh=RealWeights(null),
    )


def check_null(null: int, num_experts: int) -> None:
    """UserError unless some of `num_experts` experts are left beside `null`."""
    if not 0 <= null < num_experts:
        raise UserError(
            f"null {null} is not between 0 and {num_experts - 1}: the pool has {num_experts} "
            "experts, null ones included, and one must be real"
        )


def with_null_rows(weight: Tensor, copies: int) -> Tensor:
    """Router rows `weight` [E, D] of a trained layer with those of `copies` * E null experts.

    Each null row is a copy of a real one. With top_k multiplied by 1 + `copies` the layer starts
    exactly as the original with renormalised weights: each chosen expert brings its copies along.
    """
    return torch.cat([weight] * (1 + copies))
