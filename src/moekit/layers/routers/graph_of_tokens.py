"""A token's scores are mixed with those of related tokens (Graph of Tokens, arXiv:2505.00792).

Letters: B sequences, S their length, T = B * S tokens, D width, E experts, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import ATTENTION, RouterContext
from ..router import PipelineRouter
from ..score import LinearScore
from ..select import TopK
from ..squash import softmax
from ..weigh import WEIGHTS
from .pipeline import one_of

GRAPHS = ("similarity", "attention")


def similarity(hidden: Tensor, form: Tensor, temperature: float, visible: Tensor) -> Tensor:
    """Row-stochastic similarity [B, S, S] of tokens: softmax(u_i form u_j / temperature).

    `hidden` [B, S, D], `form` [D, D]; a token j counts for i where `visible` [B, S, S] is true, and
    every token must see at least one.
    """
    affinity = (hidden @ form) @ hidden.transpose(1, 2) / temperature
    return affinity.masked_fill(~visible, -torch.inf).softmax(-1)


def causal_visibility(token_mask: Tensor) -> Tensor:
    """Which tokens each token may see [B, S, S]: itself and earlier ones that are not padding.

    `token_mask` [B, S] is False at padding; padding sees itself, so that no row is empty.
    """
    length = token_mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=token_mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=token_mask.device)
    return earlier & token_mask[:, None, :] | itself


class MixedScore(nn.Module):
    """Log of the router probabilities averaged over a token's row of the graph of tokens.

    The softmax of these logits gives back the average. The experts see the token alone.
    """

    decodes = False

    def __init__(self, width: int, num_experts: int, graph: str, temperature: float) -> None:
        super().__init__()
        self.graph, self.temperature = graph, temperature
        self.linear = LinearScore(width, num_experts)
        if graph == "similarity":
            # Plain similarity of normalised tokens, at a scale where a token resembles itself most.
            self.form = nn.Parameter(torch.eye(width) * width**-0.5)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        scores = self.linear(key, context).softmax(-1)
        mixed = self._rows(key, context) @ scores.view(context.batch, context.length, -1)
        return mixed.flatten(0, 1).clamp_min(torch.finfo(mixed.dtype).tiny).log()

    def _rows(self, key: Tensor, context: RouterContext) -> Tensor:
        """The graph [B, S, S], of which every row sums to 1."""
        if self.graph == "attention":
            attention = context.carry.get(ATTENTION)
            if attention is None:
                raise UserError(
                    "graph attention needs the attention weights of the layer below: set the "
                    "model's attention implementation to eager"
                )
            return attention.float().mean(1)
        shape = (context.batch, context.length)
        mask = context.token_mask
        mask = key.new_ones(shape, dtype=torch.bool) if mask is None else mask.view(shape)
        visible = causal_visibility(mask)
        return similarity(key.view(*shape, -1), self.form.float(), self.temperature, visible)


@register(
    "router",
    "graph-of-tokens",
    title="Scores averaged over similar earlier tokens, or over those attended to",
    paper="Graph of Tokens, arXiv:2505.00792",
    needs=("training",),
    limits="Whole sequences only (no key-value cache); T * S memory. Made from the abstract.",
    options={
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
        "graph": "similarity of tokens, or the attention just below, averaged over heads",
        "temperature": "divides the similarity",
    },
)
def graph_of_tokens_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    weights: str = "renormalised",
    graph: str = "similarity",
    temperature: float = 1.0,
) -> nn.Module:
    """Top-k of each token's average of router probabilities over the graph, causal in both kinds.

    The formulas were reconstructed from the paper's abstract.
    """
    one_of("weights", weights, WEIGHTS)
    one_of("graph", graph, GRAPHS)
    if temperature <= 0:
        raise UserError(f"temperature {temperature} is not above 0")
    return PipelineRouter(
        num_experts,
        score=MixedScore(width, num_experts, graph, temperature),
        squash=softmax,
        select=TopK(top_k),
        weigh=WEIGHTS[weights](),
    )
