"""ModuleFormer's gate: an MLP of the token, raw weights, some modules drawn by chance in training.

ModuleFormer, arXiv 2306.04640. It gates feed-forward modules and, in `layers/module_attention.py`,
attention modules; the losses `mutual-information` and `concentration` shape it.

Letters: D width, E modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..names import one_of
from ..router import PipelineRouter
from ..score import CosineScore, LinearScore, MLPScore
from ..squash import softmax
from ..weigh import RawWeights
from .sampling import SampledTopK

SCORES = ("mlp", "linear", "cosine")


class DroppedMLPScore(MLPScore):
    """`MLPScore` with dropout on its middle in training."""

    def __init__(self, width: int, num_experts: int, hidden: int, dropout: float) -> None:
        super().__init__(width, num_experts, hidden)
        self.dropout = dropout

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        middle = self.activation(F.linear(key, self.up.float()))
        if self.dropout and context.training:
            draw = torch.rand(
                middle.shape,
                generator=context.generator("gate dropout", key.device),
                device=key.device,
            )
            middle = middle * (draw >= self.dropout) / (1 - self.dropout)
        return F.linear(middle, self.down.float())


@register(
    "router",
    "moduleformer",
    title="Top-k of a softmax of an MLP, raw weights, some experts drawn by chance in training",
    paper="ModuleFormer, arXiv:2306.04640",
    needs=("training",),
    options={
        "score": f"where logits come from: {', '.join(SCORES)}",
        "score_width": "width between the two layers of score mlp",
        "dropout": "between them, in training",
        "sampled": "of the top_k experts, how many are drawn rather than the best, in training",
    },
)
def module_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    score: str = "mlp",
    score_width: int = 256,
    dropout: float = 0.0,
    sampled: int = 0,
) -> nn.Module:
    """A softmax router with raw weights; with score linear and none drawn the plain one."""
    one_of("score", score, SCORES)
    if not 0 <= sampled <= top_k:
        raise UserError(f"sampled {sampled} is not between 0 and top_k {top_k}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout {dropout} is not from 0 to below 1")
    scorer: nn.Module
    if score == "mlp":
        scorer = DroppedMLPScore(width, num_experts, score_width, dropout)
    elif score == "cosine":
        scorer = CosineScore(width, num_experts)
    else:
        scorer = LinearScore(width, num_experts)
    return PipelineRouter(
        num_experts,
        score=scorer,
        squash=softmax,
        select=SampledTopK(top_k, sampled),
        weigh=RawWeights(),
    )
