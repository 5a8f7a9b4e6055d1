"""Prototype routing with explicit guidance (ProMoE, arXiv 2510.24711).

Tokens of one type, in diffusion those of unconditional samples, go to an expert of their own; the
others to the experts whose prototypes they resemble, and a contrastive loss, not a balance loss,
pulls each prototype to its own tokens.

Letters: T tokens, E experts of which C are chosen by resemblance, D width, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..names import one_of
from ..router import Choice, PipelineRouter
from ..routing import Routing
from ..select import ExpertChoice, TopK
from ..squash import identity, softmax
from ..terms import NEVER
from ..weigh import RawWeights

COSINES = "prototype_cosines"
FILLED = "prototype_filled"
CHOOSERS = ("tokens", "experts")


SCORE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    # As cosines they may be negative, and minus infinity for the expert of unconditional tokens.
    "identity": identity,
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
}


class PrototypeScore(nn.Module):
    """Cosine of the token and each of C prototypes; minus infinity for the `extra` experts after.

    `weight` [C, D], from N(0, 0.02).
    """

    def __init__(self, width: int, prototypes: int, extra: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, width))
        self.extra = extra
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        return F.pad(cosines(key, self.weight.float()), (0, self.extra), value=NEVER)


def cosines(rows: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every row [n, D] with every prototype [C, D]: [n, C]."""
    return F.linear(F.normalize(rows, dim=-1), F.normalize(prototypes, dim=-1))


class AmongFirst:
    """The rule `select` among the first `count` experts alone."""

    def __init__(self, select: Callable[[Tensor, RouterContext], Choice], count: int) -> None:
        self.select, self.count = select, count
        self.top_k = getattr(select, "top_k", None)
        self.causal = getattr(select, "causal", True)
        self.sees_batch = getattr(select, "sees_batch", False)

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        return self.select(selection[:, : self.count], context)


class SendType:
    """Edit: tokens of type `number` go to `expert` alone, with weight 1."""

    def __init__(self, number: int, expert: int) -> None:
        self.number, self.expert = number, expert

    def __call__(self, routing: Routing, context: RouterContext) -> Routing:
        if context.token_type is None:
            return routing
        sent = context.token_type == self.number
        token = torch.cat([routing.token[~sent[routing.token]], sent.nonzero().flatten()])
        count = int(sent.sum())
        expert = F.pad(routing.expert[~sent[routing.token]], (0, count), value=self.expert)
        weight = F.pad(routing.weight[~sent[routing.token]], (0, count), value=1.0)
        order = torch.argsort(token, stable=True)
        top_k = routing.top_k if routing.top_k == 1 or not count else None
        return replace(
            routing, token=token[order], expert=expert[order], weight=weight[order], top_k=top_k
        )


class PrototypeRouter(PipelineRouter):
    """The pipeline with what the contrastive loss needs in the record, in training."""

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        routing = super().forward(hidden, context)
        if not context.training:
            return routing
        prototypes = self.score.weight.float()
        key = (hidden if context.key is None else context.key).float()
        means, filled = assigned_means(routing, key, len(prototypes))
        extra = {COSINES: cosines(prototypes, means), FILLED: filled}
        return replace(routing, extra={**routing.extra, **extra})


def assigned_means(routing: Routing, rows: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows [T, D] that each of the first experts was given [C, D], and who has any."""
    keep = routing.expert < experts
    if routing.token_mask is not None:
        keep &= routing.token_mask[routing.token]
    token, expert = routing.token[keep], routing.expert[keep]
    counts = torch.bincount(expert, minlength=experts)
    sums = rows.new_zeros(experts, rows.shape[1]).index_add(0, expert, rows[token])
    return sums / counts.clamp(min=1)[:, None], counts > 0


@register(
    "balance",
    "routing-contrastive",
    title="Each prototype resembles the mean of its own tokens and no other's",
    paper="ProMoE, arXiv:2510.24711",
    needs=("training",),
    limits="For routers with prototypes.",
    options={"temperature": "divides the cosines"},
)
def routing_contrastive_loss(routing: Routing, *, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of cos(prototype i, mean of expert j's tokens) / temperature with i = j.

    Over the experts that got tokens; 0 if fewer than two did. log(n) where n cosines are equal,
    towards 0 where every prototype lies at its own mean and the means apart. UserError for a
    record without prototypes.
    """
    if COSINES not in routing.extra:
        raise UserError("routing-contrastive needs prototypes: use router 'promoe', in training")
    filled = routing.extra[FILLED].nonzero().flatten()
    logits = routing.extra[COSINES][filled][:, filled] / temperature
    if len(filled) < 2:
        return logits.sum() * 0.0
    return F.cross_entropy(logits, torch.arange(len(filled), device=logits.device))


@register(
    "router",
    "promoe",
    title="By cosine to learned prototypes; tokens of one type to an expert of their own",
    paper="ProMoE, arXiv:2510.24711",
    needs=("training",),
    limits="Balanced by routing-contrastive alone. Not causal where experts choose.",
    options={
        "score_map": f"from cosines to weights: {', '.join(SCORE_MAPS)}",
        "select": f"who chooses: {' or '.join(CHOOSERS)}",
        "null_type": "type of tokens that the last expert takes, alone; None: none",
    },
)
def prototype_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    score_map: str = "identity",
    select: str = "tokens",
    null_type: int | None = None,
) -> nn.Module:
    """Top-k of cosines with raw weights, which may be negative with `score_map` identity.

    With `null_type` the last expert is for tokens of that type alone. Where experts choose, each
    takes max(1, S * `top_k` / C) tokens of every sequence of S.
    """
    one_of("score_map", score_map, SCORE_MAPS)
    one_of("select", select, CHOOSERS)
    own = 0 if null_type is None else 1
    chosen = num_experts - own
    if top_k > chosen:
        raise UserError(f"top_k {top_k} exceeds the {chosen} experts beside that of null_type")
    rule: Callable = TopK(top_k) if select == "tokens" else ExpertChoice(top_k, within="sequence")
    return PrototypeRouter(
        num_experts,
        score=PrototypeScore(width, chosen, own),
        squash=SCORE_MAPS[score_map],
        select=AmongFirst(rule, chosen),
        weigh=RawWeights(),
        edits=[] if null_type is None else [SendType(null_type, num_experts - 1)],
    )
