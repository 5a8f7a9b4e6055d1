"""Routers that read a key beside the tokens: a noise level, a timestep, a task.

MoDE, arXiv 2412.12953; Switch-DiT, arXiv 2403.09176. The key is `RouterContext.key` [T, Dk]; where
there is none, the hidden state is its own key. With finitely many keys the route is a table: see
`layers/route_table.py`.

Letters: T tokens, D width, Dk width of a key, E experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..balance.load import at_balance
from ..context import RouterContext
from ..names import one_of
from ..router import PipelineRouter
from ..routing import Routing
from ..score import MLPScore
from ..select import TopK
from ..squash import softmax
from ..weigh import WEIGHTS
from .sampling import SampledTopK


class NoiseScore(MLPScore):
    """Logits over a temperature of two layers with GELU between."""

    def __init__(self, key_width: int, num_experts: int, temperature: float) -> None:
        super().__init__(key_width, num_experts, 2 * key_width)
        self.temperature = temperature

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        return super().forward(key, context) / self.temperature


class TimestepScore(nn.Module):
    """Logits W silu(key) + b."""

    def __init__(self, key_width: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(key_width, num_experts)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        weight, bias = self.linear.weight.float(), self.linear.bias.float()
        return F.linear(F.silu(key), weight, bias)


@register(
    "router",
    "mode",
    title="By the noise level alone; experts drawn in training, the best at inference",
    paper="MoDE, arXiv:2412.12953",
    needs=("training",),
    options={
        "key_width": "width of the key; None: that of the hidden states",
        "temperature": "divides the logits",
        "sampled": "experts drawn rather than the best, in training; None: all of top_k",
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
    },
)
def noise_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    key_width: int | None = None,
    temperature: float = 1.0,
    sampled: int | None = None,
    weights: str = "renormalised",
) -> nn.Module:
    """Top-k of a softmax of an MLP of the key, `sampled` of them drawn by their score in training.

    The logits in the record are not shifted by their largest: a z-loss on shifted logits, as in the
    released code, hardly penalises anything.
    """
    one_of("weights", weights, WEIGHTS)
    sampled = top_k if sampled is None else sampled
    if not 0 <= sampled <= top_k:
        raise UserError(f"sampled {sampled} is not between 0 and top_k {top_k}")
    if temperature <= 0:
        raise UserError(f"temperature {temperature} is not above 0")
    return PipelineRouter(
        num_experts,
        score=NoiseScore(key_width or width, num_experts, temperature),
        squash=softmax,
        select=SampledTopK(top_k, sampled),
        weigh=WEIGHTS[weights](),
    )


@register(
    "router",
    "switch-dit",
    title="By the timestep alone: top-k of a softmax of a linear map of silu(key), raw weights",
    paper="Switch-DiT, arXiv:2403.09176",
    needs=("training",),
    options={"key_width": "width of the key; None: that of the hidden states"},
)
def timestep_router(
    width: int, num_experts: int, top_k: int, *, key_width: int | None = None
) -> nn.Module:
    """The gate of a Switch-DiT block; `TaskMask` makes its mask with it."""
    return PipelineRouter(
        num_experts,
        score=TimestepScore(key_width or width, num_experts),
        squash=softmax,
        select=TopK(top_k),
        weigh=WEIGHTS["raw"](),
    )


@register(
    "balance",
    "weight-load-loss",
    title="Product of an expert's load and its mean combine weight",
    paper="MoDE, arXiv:2412.12953",
    needs=("training",),
)
@at_balance(lambda experts, top_k: float(top_k))
def weight_load_loss(routing: Routing) -> Tensor:
    """E * sum over experts of (summed weight / tokens) * (pairs / tokens), no gradient of the load.

    K at balance where weights are renormalised over K experts a token.
    """
    tokens = max(1, int(routing.num_real_tokens))
    weight = routing.weight
    if routing.token_mask is not None:
        weight = weight * routing.token_mask[routing.token]
    total = weight.new_zeros(routing.num_experts).index_add(0, routing.expert, weight)
    return routing.num_experts * (total * routing.counts()).sum() / tokens**2
