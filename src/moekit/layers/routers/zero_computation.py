"""Routing over experts of unequal cost, helped by the layer before (MoE++, arXiv:2410.07348).

Letters: T tokens, E experts, K chosen, N pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..edits import ORDERS, Capacity
from ..router import PipelineRouter
from ..routing import Routing
from ..score import LinearScore, MLPScore
from ..select import TopK
from ..squash import softmax
from ..weigh import WEIGHTS
from .null_experts import RealWeights, check_null
from .pipeline import one_of

LOGITS = "moe++ logits"
SCORES = ("linear", "mlp")
RESIDUALS = ("learned", "identity", "none")
WEIGHT_RULES = (*WEIGHTS, "real")


class ResidualScore(nn.Module):
    """Logits of `score` plus a map of the logits [T, E] of the MoE layer before.

    The map [E, E] is learned from zero, so that training starts from the plain router; or it is the
    identity. The sum is what the next layer sees. All layers need the same number of experts.
    """

    def __init__(self, score: nn.Module, num_experts: int, residual: str) -> None:
        super().__init__()
        self.score, self.residual = score, residual
        if residual == "learned":
            self.map = nn.Parameter(torch.zeros(num_experts, num_experts))

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        logits = self.score(key, context)
        before = context.carry.get(LOGITS)
        if before is not None and self.residual != "none":
            if before.shape != logits.shape:
                raise UserError(
                    f"layer {context.layer} has {logits.shape[1]} experts and the MoE layer before "
                    f"{before.shape[1]}: the residual of router 'moe++' needs equal numbers"
                )
            logits = logits + (
                before @ self.map.float().T if self.residual == "learned" else before
            )
        context.carry[LOGITS] = logits
        return logits


def typed_shares(free: Tensor, tau: float) -> Tensor:
    """The share of all pairs meant for each expert [E], where `free` [E] says which cost nothing.

    An expert of cost gets `tau` times the share of a free one; shares sum to 1. Their sum over the
    experts of cost is the predicted part of the pairs that are computed.
    """
    relative = torch.where(free, 1.0, tau)
    return relative / relative.sum()


class TypedCapacity(Capacity):
    """A capacity that gives experts without cost 1 / `tau` times the places of the others.

    `factor` is over the fair share of all T * K pairs: the paper's formula leaves out the K, by
    which about half of the pairs of top-2 would be dropped.
    """

    def __init__(
        self,
        factor: float | None,
        order: str,
        top_k: int,
        eval_factor: float | None,
        *,
        tau: float,
    ) -> None:
        super().__init__(factor, order, top_k, eval_factor)
        self.tau = tau

    def places(self, routing: Routing, factor: float) -> Tensor:
        """Places in every expert: int64 [E]."""
        # A router without a layer knows no costs: then all experts have the same share.
        cost = torch.ones(routing.num_experts) if routing.cost is None else routing.cost
        share = typed_shares(cost.to(routing.expert.device) == 0, self.tau)
        return (factor * self.top_k * int(routing.num_real_tokens) * share).ceil().long()


@register(
    "router",
    "moe++",
    title="Top-k over experts of which some cost nothing, the layer before in the logits",
    paper="MoE++, arXiv:2410.07348",
    needs=("training",),
    limits=(
        "All MoE layers need the same number of experts. The released model also doubles the "
        "experts' input, which is not done here."
    ),
    options={
        "null": "with weights real, how many zero experts the pool ends with",
        "score": f"of the token alone: {', '.join(SCORES)} (8 E wide with tanh, as released)",
        "residual": f"map of the layer before's logits: {', '.join(RESIDUALS)}",
        "weights": "raw as in the paper; real as released: renormalised over all but null experts",
        "tau": "share of an expert that computes, over that of one that does not",
        "capacity": "places over the typed fair share, in training; None: dropless",
        "eval_capacity": "the same outside of training",
        "order": f"who gets a place first: {', '.join(ORDERS)}",
    },
)
def zero_computation_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    null: int = 0,
    score: str = "linear",
    residual: str = "learned",
    weights: str = "raw",
    tau: float = 0.75,
    capacity: float | None = 1.1,
    eval_capacity: float | None = None,
    order: str = "token",
) -> nn.Module:
    """Top-k of a softmax with `ResidualScore` and `TypedCapacity`.

    Which experts compute nothing is read from the pool's costs. Without any, with `residual` none
    and dropless, this is plain top-k.
    """
    for what, value, known in (
        ("score", score, SCORES),
        ("residual", residual, RESIDUALS),
        ("weights", weights, WEIGHT_RULES),
        ("order", order, ORDERS),
    ):
        one_of(what, value, known)
    check_null(null, num_experts)
    if null and weights != "real":
        raise UserError(f"null {null} is for weights real; with weights {weights} leave it out")
    for what, number in (("tau", tau), ("capacity", capacity), ("eval_capacity", eval_capacity)):
        if number is not None and number <= 0:
            raise UserError(f"{what} {number} is not above 0")
    if score == "linear":
        own: nn.Module = LinearScore(width, num_experts)
    else:
        own = MLPScore(width, num_experts, 8 * num_experts, activation="tanh")
    dropless = capacity is None and eval_capacity is None
    limit = TypedCapacity(capacity, order, top_k, eval_capacity, tau=tau)
    return PipelineRouter(
        num_experts,
        score=ResidualScore(own, num_experts, residual),
        squash=softmax,
        select=TopK(top_k),
        weigh=RealWeights(null) if weights == "real" else WEIGHTS[weights](),
        edits=[] if dropless else [limit],
    )
