"""Edits of the pairs: parts `(routing, context) -> routing` that run last."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .context import RouterContext
from .router import keep_pairs
from .routing import Routing

ORDERS = ("token", "choice", "weight", "random")


class Capacity:
    """Every expert computes at most ceil(`factor` * pairs / E) pairs; the others are dropped.

    A dropped pair's expert adds nothing and the other weights stay as they are. `order` says who
    comes first: "choice" (all first choices before any second one, each in token order; GShard,
    arXiv 2006.16668), "token" (token order alone), "weight" (batch-prioritised, V-MoE, arXiv
    2106.05974) or "random" (RTS, arXiv 2109.10465). `top_k` is the pairs that a token asks for on
    average; padding gets no place. `eval_factor` counts outside of training. None: dropless.
    """

    sees_batch = True
    # A token alone fills no expert: from a cache nothing is dropped, whatever the prompt lost.
    decodes = True

    def __init__(
        self, factor: float | None, order: str, top_k: float, eval_factor: float | None
    ) -> None:
        self.factor, self.order, self.top_k = factor, order, top_k
        self.eval_factor = eval_factor
        # A later token's first choice takes a place before an earlier token's second choice.
        self.causal = order == "token" or (order == "choice" and top_k == 1)

    def __call__(self, routing: Routing, context: RouterContext) -> Routing:
        factor = self.factor if context.training else self.eval_factor
        if factor is None:
            return routing
        places = self.places(routing, factor)[routing.expert]
        order = torch.argsort(self._priority(routing, context), stable=True)
        place = torch.empty_like(order)
        place[order] = _place_in_expert(routing.expert[order], routing.num_experts)
        keep = place < places
        if routing.token_mask is not None:
            keep &= routing.token_mask[routing.token]
        return keep_pairs(routing, keep)

    def places(self, routing: Routing, factor: float) -> Tensor:
        """Places in every expert: int64 [E]."""
        tokens = int(routing.num_real_tokens)
        each = math.ceil(factor * self.top_k * tokens / routing.num_experts)
        return torch.full((routing.num_experts,), each, device=routing.expert.device)

    def _priority(self, routing: Routing, context: RouterContext) -> Tensor:
        """Smaller comes first; equal ones in token order."""
        if self.order == "choice":
            value = routing.rank().float()
        elif self.order == "weight":
            value = -routing.weight.detach().float()
        elif self.order == "random":
            device = routing.token.device
            generator = context.generator("capacity", device)
            value = torch.rand(routing.token.shape, generator=generator, device=device)
        else:
            value = torch.zeros(routing.token.shape, device=routing.token.device)
        if routing.token_mask is not None:
            value = value.masked_fill(~routing.token_mask[routing.token], float("inf"))
        return value


class SecondThinning:
    """Keep every choice after the first with probability min(1, 2 * weight), in training only.

    GShard, arXiv 2006.16668. What is thinned out was not asked for and does not count as
    dropped.
    """

    def __call__(self, routing: Routing, context: RouterContext) -> Routing:
        if not context.training:
            return routing
        device = routing.token.device
        draw = torch.rand(
            routing.token.shape, generator=context.generator("thinning", device), device=device
        )
        keep = (routing.rank() == 0) | (draw < 2 * routing.weight.detach())
        return keep_pairs(routing, keep, dropped=False)


def _place_in_expert(expert: Tensor, num_experts: int) -> Tensor:
    """How many earlier entries of `expert` [N] name the same expert: int64 [N]."""
    ordered, source = torch.sort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    start = counts.cumsum(0) - counts
    place = torch.empty_like(expert)
    place[source] = torch.arange(len(expert), device=expert.device) - start[ordered]
    return place
