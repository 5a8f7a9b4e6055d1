"""Experts drawn at random (THOR, arXiv:2110.04260), also the control for every learned router.

Letters: B sequences, T tokens, E experts, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.registry import register, register_preset

from ..context import RouterContext
from ..names import one_of
from ..routing import Routing

UNITS = ("batch", "sequence", "token", "all")


class StochasticRouter(nn.Module):
    """Draws `top_k` experts, uniformly and without replacement, each of weight 1 / `top_k`.

    One draw for the whole batch, for every sequence, or for every token; "all" takes the average
    of all experts instead. `draw` counts in training and `eval_draw` outside. Nothing is learned.
    """

    causal = True

    def __init__(self, num_experts: int, top_k: int, draw: str, eval_draw: str) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.draw, self.eval_draw = draw, eval_draw

    @property
    def sees_batch(self) -> bool:
        """Whether a draw belongs to a place in the batch, so that batch mates shift it."""
        return {self.draw, self.eval_draw} & {"sequence", "token"} != set()

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of `hidden` [T, D], of which only the number of rows counts."""
        draw = self.draw if context.training else self.eval_draw
        rows = {"batch": 1, "all": 1, "sequence": context.batch, "token": context.num_tokens}[draw]
        top_k = self.num_experts if draw == "all" else self.top_k
        noise = torch.rand(
            rows, self.num_experts, generator=context.generator("stochastic experts")
        )
        ids = noise.topk(top_k, dim=-1).indices.to(hidden.device)
        ids = ids.repeat_interleave(context.num_tokens // rows, 0)
        weights = torch.full(ids.shape, 1 / top_k, device=hidden.device)
        return Routing.from_topk(
            ids,
            weights,
            self.num_experts,
            token_mask=context.token_mask,
            cost=context.cost,
            layer=context.layer,
            round=context.round,
        )

    def after_step(self, counts: Tensor) -> None:
        """Nothing moves."""


@register(
    "router",
    "thor",
    title="One draw of experts for the whole batch in training, one per sequence at inference",
    paper="THOR, arXiv:2110.04260",
    needs=("training",),
    limits="Nothing is learned by the router; train with the consistency of two passes.",
    options={
        "draw": f"what shares a draw in training: {', '.join(UNITS)}",
        "eval_draw": "the same outside of training",
    },
)
def stochastic_router(
    width: int, num_experts: int, top_k: int, *, draw: str = "batch", eval_draw: str = "sequence"
) -> nn.Module:
    """Random experts; draws are repeated exactly for the same seed, step and layer."""
    one_of("draw", draw, UNITS)
    one_of("eval_draw", eval_draw, UNITS)
    return StochasticRouter(num_experts, top_k, draw, eval_draw)


register_preset(
    stochastic_router,
    "random",
    kind="router",
    title="Experts drawn at random for every token: the control of every router comparison",
    paper="THOR, arXiv:2110.04260",
    needs=("training",),
    settings={"draw": "token", "eval_draw": "token"},
)


def consistency_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far two passes with different experts disagree: 0.5 * sum (p1 - p2)(log p1 - log p2).

    `first` and `second` are logits [..., V], `mask` [...] is False where nothing counts. The
    symmetric Kullback-Leibler divergence, summed over tokens as THOR's cross-entropy is.
    """
    log_first, log_second = F.log_softmax(first.float(), -1), F.log_softmax(second.float(), -1)
    terms = (log_first.exp() - log_second.exp()) * (log_first - log_second)
    per_token = 0.5 * terms.sum(-1)
    return (per_token if mask is None else per_token[mask]).sum()
