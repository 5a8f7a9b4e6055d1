"""A document may use only a pool of experts, which its own tokens choose (EMO, arXiv:2605.06663).

Letters: B sequences, S their length, T = B * S tokens, E experts, M documents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..router import PipelineRouter
from ..score import LinearScore
from ..select import TopK
from ..squash import softmax
from ..terms import NEVER
from ..weigh import WEIGHTS
from .pipeline import one_of


def document_index(ends: Tensor) -> Tensor:
    """Which document each token belongs to, [T], of `ends` [B, S]: True at a document's last token.

    Every row starts a new document; documents are numbered in the order of the flattened tokens.
    """
    starts = torch.ones_like(ends)
    starts[:, 1:] = ends[:, :-1]
    return starts.reshape(-1).long().cumsum(0) - 1


@torch.no_grad()
def document_pools(
    probabilities: Tensor, document: Tensor, sizes: Tensor, forced: int = 0
) -> Tensor:
    """Mask [T, E] of the experts that each token may use.

    A document's pool are the `sizes` [M] experts with the largest sum of `probabilities` [T, E]
    over its tokens (`document` [T]), among them always the last `forced` ones.
    """
    num_documents, num_experts = sizes.shape[0], probabilities.shape[1]
    mass = probabilities.new_zeros(num_documents, num_experts)
    mass = mass.index_add(0, document, probabilities)
    mass[:, num_experts - forced :] = torch.inf
    order = mass.sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(num_experts, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < sizes[:, None])[document]


class PooledScore(nn.Module):
    """Linear logits, minus infinity outside of the pool of the token's document.

    In training a document's pool has between `smallest` and `largest` experts, drawn for every
    document and layer; outside it has `evaluation` experts, or there is none. The pool is made of
    all tokens of the document, later ones included: where there is one, the router is not causal.
    Documents end at token `end_id`; without one, they are what `context.token_type` numbers, and
    without that the sequences.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        smallest: int,
        largest: int,
        evaluation: int | None,
        forced: int,
        end_id: int | None,
    ) -> None:
        super().__init__()
        self.linear = LinearScore(width, num_experts)
        self.num_experts, self.forced, self.end_id = num_experts, forced, end_id
        self.smallest, self.largest, self.evaluation = smallest, largest, evaluation

    @property
    def causal(self) -> bool:
        smallest = self.smallest if self.training else self.evaluation
        return smallest is None or smallest >= self.num_experts

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        logits = self.linear(key, context)
        if not context.training and self.evaluation is None:
            return logits
        document = self._documents(context).to(logits.device)
        probabilities = logits.softmax(-1)
        if context.token_mask is not None:
            probabilities = probabilities * context.token_mask[:, None]
        sizes = self._sizes(int(document.max()) + 1, context).to(logits.device)
        allowed = document_pools(probabilities, document, sizes, self.forced)
        return logits.masked_fill(~allowed, NEVER)

    def _documents(self, context: RouterContext) -> Tensor:
        if self.end_id is not None:
            if context.token_id is None:
                raise UserError(
                    "option end_id of router 'emo' needs token ids, which this model does not "
                    "hand on"
                )
            return document_index((context.token_id == self.end_id).view(context.batch, -1))
        sequence = torch.arange(context.batch).repeat_interleave(context.length)
        if context.token_type is None:
            return sequence
        pairs = torch.stack([sequence.to(context.token_type.device), context.token_type], 1)
        return pairs.unique(dim=0, return_inverse=True)[1]

    def _sizes(self, documents: int, context: RouterContext) -> Tensor:
        if not context.training:
            return torch.full((documents,), self.evaluation or self.num_experts)
        generator = context.generator("size of document pools")
        return torch.randint(self.smallest, self.largest + 1, (documents,), generator=generator)


@register(
    "router",
    "emo",
    title="Every document keeps to a pool of experts that its own tokens choose",
    paper="EMO, arXiv:2605.06663",
    needs=("training",),
    limits="Not causal where a pool is in force: leave eval_pool out to measure likelihoods.",
    options={
        "smallest_pool": "fewest experts a document may use; None: top_k",
        "largest_pool": "most experts a document may use; None: all",
        "eval_pool": "experts a document may use outside of training; None: all",
        "forced": "last experts that are in every pool",
        "end_id": "token that ends a document; None: by token type, or by sequence",
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
    },
)
def document_pool_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    smallest_pool: int | None = None,
    largest_pool: int | None = None,
    eval_pool: int | None = None,
    forced: int = 0,
    end_id: int | None = None,
    weights: str = "raw",
) -> nn.Module:
    """Top-k of a softmax over the experts of the document's pool.

    Raises UserError for pools that hold fewer than `top_k` experts or more than there are.
    """
    one_of("weights", weights, WEIGHTS)
    smallest = top_k if smallest_pool is None else smallest_pool
    largest = num_experts if largest_pool is None else largest_pool
    if not top_k <= smallest <= largest <= num_experts:
        raise UserError(
            f"top_k {top_k}, smallest_pool {smallest}, largest_pool {largest} and the "
            f"{num_experts} experts must not decrease in this order"
        )
    if eval_pool is not None and not top_k <= eval_pool <= num_experts:
        raise UserError(
            f"eval_pool {eval_pool} is not between top_k {top_k} and the {num_experts} experts"
        )
    if not 0 <= forced <= smallest:
        raise UserError(f"forced {forced} is not between 0 and smallest_pool {smallest}")
    return PipelineRouter(
        num_experts,
        score=PooledScore(
            width,
            num_experts,
            smallest=smallest,
            largest=largest,
            evaluation=eval_pool,
            forced=forced,
            end_id=end_id,
        ),
        squash=softmax,
        select=TopK(top_k),
        weigh=WEIGHTS[weights](),
    )
