"""Routing by the type of a token: routers of their own, experts of their own.

MoIIE (arXiv 2508.09779): each modality has its own router over its own experts and the shared ones.
Ming (arXiv 2510.24821): each modality has its own router over all experts. The type is
`RouterContext.token_type`; where there is none, every token is of type 0.

Letters: T tokens, M types, E experts, D width, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import Option, register, register_preset, registry

from ..context import RouterContext
from ..router import PipelineRouter
from ..routing import Routing
from ..select import TopK
from ..squash import softmax
from ..terms import NEVER, ExpertBias
from ..weigh import WEIGHTS
from .pipeline import one_of

TYPE = "token_type"


@dataclass(frozen=True)
class TypePools:
    """Which experts each of `types` may use: the first `shared`, and an equal part of the rest.

    Raises UserError where the rest does not divide.
    """

    num_experts: int
    types: int
    shared: int

    def __post_init__(self) -> None:
        if self.types < 1:
            raise UserError(f"types {self.types} is below 1")
        own = self.num_experts - self.shared
        if not 0 <= self.shared <= self.num_experts or own % self.types:
            raise UserError(
                f"{self.num_experts} experts less {self.shared} shared ones do not divide among "
                f"{self.types} types"
            )

    @property
    def own(self) -> int:
        """Experts that only one type may use."""
        return (self.num_experts - self.shared) // self.types

    def mask(self, device: torch.device) -> Tensor:
        """Whether a type may use an expert: bool [M, E]."""
        place = torch.arange(self.num_experts, device=device) - self.shared
        owner = place.div(max(1, self.own), rounding_mode="floor")
        return (place < 0) | (owner == torch.arange(self.types, device=device)[:, None])


def token_types(context: RouterContext, types: int, device: torch.device) -> Tensor:
    """The type of every token, int64 [T]; UserError for one that there is not."""
    if context.token_type is None:
        return torch.zeros(context.num_tokens, dtype=torch.int64, device=device)
    found = context.token_type.to(device)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < types:
        raise UserError(
            f"token types from {int(found.min())} to {int(found.max())} do not fit a router of "
            f"{types} types"
        )
    return found


class TypedScore(nn.Module):
    """Linear logits by the rows of the token's type, minus infinity outside its type's pool.

    `weight` [M, E, D], or [1, E, D] where the types share a router.
    """

    def __init__(self, width: int, pools: TypePools, *, one_router: bool) -> None:
        super().__init__()
        self.pools = pools
        routers = 1 if one_router else pools.types
        self.weight = nn.Parameter(torch.empty(routers, pools.num_experts, width))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        kind = token_types(context, self.pools.types, key.device)
        # All routers on all tokens: a few rows each, cheaper than sorting the tokens.
        logits = F.linear(key, self.weight.float().flatten(0, 1))
        logits = logits.unflatten(-1, self.weight.shape[:2])
        row = kind if len(self.weight) > 1 else torch.zeros_like(kind)
        own = logits[torch.arange(len(key), device=key.device), row]
        return own.masked_fill(~self.pools.mask(key.device)[kind], NEVER)


class TypedBias(ExpertBias):
    """A loss-free bias for every type, `expert_bias` [M, E], moved by that type's own pairs.

    One router's balance does not imply the pool's, and a common bias would take a modality's
    imbalance out on the others.
    """

    seen: Tensor

    def __init__(self, pools: TypePools, rate: float) -> None:
        super().__init__(pools.num_experts, rate)
        self.pools = pools
        shape = (pools.types, pools.num_experts)
        self.register_buffer("expert_bias", torch.zeros(shape))
        self.register_buffer("seen", torch.zeros(shape))

    def forward(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        kind = token_types(context, self.pools.types, selection.device)
        allowed = self.pools.mask(selection.device)[kind]
        return selection.masked_fill(~allowed, NEVER) + self.expert_bias[kind]

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add the pairs of `routing` by type; a layer that runs twice counts all types twice."""
        kind = routing.extra[TYPE][routing.token]
        ones = torch.ones(len(kind), device=kind.device)
        if routing.token_mask is not None:
            ones = routing.token_mask[routing.token].float()
        self.seen.index_put_((kind, routing.expert), ones, accumulate=True)

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        """Move every type's bias; `counts` [E] of all types together says too little."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
        for bias, seen, pool in zip(
            self.expert_bias, self.seen, self.pools.mask(self.seen.device), strict=True
        ):
            bias[pool] += self.rate * torch.sign(seen[pool].mean() - seen[pool])
        self.seen.zero_()


class RecordType:
    """Edit: keep each token's type in the record, for losses by type, and count for `bias`."""

    def __init__(self, types: int, bias: TypedBias | None) -> None:
        self.types, self.bias = types, bias

    def __call__(self, routing: Routing, context: RouterContext) -> Routing:
        kind = token_types(context, self.types, routing.token.device)
        routing = replace(routing, extra={**routing.extra, TYPE: kind})
        if self.bias is not None and context.training:
            self.bias.count(routing)
        return routing


def of_type(routing: Routing, number: int) -> Routing:
    """`routing` as if only tokens of type `number` were real."""
    own = routing.extra[TYPE] == number
    mask = own if routing.token_mask is None else own & routing.token_mask
    return replace(routing, token_mask=mask)


def by_type(routing: Routing, loss: Callable[[Routing], Tensor]) -> Tensor:
    """The sum over the types of tokens in the batch of `loss` of that type's own routing.

    For balance losses by modality (MoIIE, arXiv 2508.09779): tokens of one type do not move the
    router of another.
    """
    losses = [loss(of_type(routing, int(n))) for n in routing.extra[TYPE].unique()]
    return torch.stack(losses).sum()


@register(
    "router",
    "typed",
    title="A router for each type of token, over all experts or its own and shared ones",
    paper="MoIIE, arXiv:2508.09779; Ming-Flash-Omni, arXiv:2510.24821",
    needs=("training",),
    limits="The type comes from the batch (token_type); without it every token is of type 0.",
    options={
        "types": "types of tokens",
        "shared": "experts that all types may use, the first of the pool; None: all",
        "one_router": "one router for all types, with pools of their own",
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
        "bias_rate": "step of a loss-free bias for each type; 0: none",
    },
)
def typed_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    types: int = 2,
    shared: int | None = None,
    one_router: bool = False,
    weights: str = "renormalised",
    bias_rate: float = 0.0,
) -> nn.Module:
    """Top-k of a softmax over the pool of the token's type.

    With all experts shared and one router this is the plain one. UserError where pools do not
    divide, or hold fewer experts than `top_k`.
    """
    one_of("weights", weights, WEIGHTS)
    pools = TypePools(num_experts, types, num_experts if shared is None else shared)
    if top_k > pools.shared + pools.own:
        raise UserError(
            f"top_k {top_k} exceeds the {pools.shared + pools.own} experts that a type may use"
        )
    bias = TypedBias(pools, bias_rate) if bias_rate else None
    return PipelineRouter(
        num_experts,
        score=TypedScore(width, pools, one_router=one_router),
        squash=softmax,
        terms=[] if bias is None else [bias],
        select=TopK(top_k),
        weigh=WEIGHTS[weights](),
        edits=[RecordType(types, bias)],
    )


def _options(*names: str) -> tuple[Option, ...]:
    known = {option.name: option for option in registry.find("typed", kind="router").options}
    return tuple(known[name] for name in names)


@register(
    "router",
    "moiie",
    title="Vision and text each choose among their own experts and shared ones",
    paper="MoIIE, arXiv:2508.09779",
    needs=("training",),
    limits="Needs a number of experts that 4 divides; the shared half comes first in the pool.",
)
def moiie_router(width: int, num_experts: int, top_k: int) -> nn.Module:
    """Half of the experts are shared, a quarter is for each of two types; renormalised."""
    if num_experts % 4:
        raise UserError(f"router 'moiie' needs experts in fours, not {num_experts}")
    return typed_router(width, num_experts, top_k, shared=num_experts // 2)


register_preset(
    typed_router,
    "ming",
    kind="router",
    title="A router each for text, image and audio tokens over one pool of experts",
    paper="Ming-Flash-Omni, arXiv:2510.24821",
    needs=("training",),
    limits="The type comes from the batch (token_type); without it every token is of type 0.",
    settings={"types": 3},
    options=_options("weights", "bias_rate"),
)
