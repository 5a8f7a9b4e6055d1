"""Routing by the type of a token: routers of their own, experts of their own.

MoIIE (arXiv 2508.09779): each modality has its own router over its own experts and the shared ones.
Ming (arXiv 2510.24821): each modality has its own router over all experts. The type is
`RouterContext.token_type`; where there is none it follows from the token's id by `boundaries` (a
vocabulary that holds one modality after the other), and without those every token is of type 0.

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

from ..balance.losses import balance_loss
from ..context import RouterContext
from ..names import one_of
from ..router import PipelineRouter
from ..routing import Routing
from ..select import TopK
from ..squash import softmax
from ..terms import NEVER, ExpertBias
from ..weigh import WEIGHTS

TYPE = "token_type"
_LIMITS = "Types come from the batch (token_type) or from token ids; otherwise all are of type 0."


@dataclass(frozen=True)
class TypePools:
    """Which experts each of `types` may use: the first `shared`, and an equal part of the rest.

    `boundaries` are the first token ids of the types after the first, ascending; empty: types do
    not follow from ids. Raises UserError where the rest or the boundaries do not fit the types.
    """

    num_experts: int
    types: int
    shared: int
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.types < 1:
            raise UserError(f"types {self.types} is below 1")
        own = self.num_experts - self.shared
        if not 0 <= self.shared <= self.num_experts or own % self.types:
            raise UserError(
                f"{self.num_experts} experts less {self.shared} shared ones do not divide among "
                f"{self.types} types"
            )
        if self.boundaries and len(self.boundaries) != self.types - 1:
            raise UserError(
                f"boundaries {list(self.boundaries)} part {len(self.boundaries) + 1} types of ids, "
                f"not {self.types}"
            )
        if sorted(set(self.boundaries)) != list(self.boundaries):
            raise UserError(f"boundaries {list(self.boundaries)} do not ascend")

    @property
    def own(self) -> int:
        """Experts that only one type may use."""
        return (self.num_experts - self.shared) // self.types

    def mask(self, device: torch.device) -> Tensor:
        """Whether a type may use an expert: bool [M, E]."""
        place = torch.arange(self.num_experts, device=device) - self.shared
        owner = place.div(max(1, self.own), rounding_mode="floor")
        return (place < 0) | (owner == torch.arange(self.types, device=device)[:, None])


def token_types(context: RouterContext, pools: TypePools, device: torch.device) -> Tensor:
    """The type of every token, int64 [T]; UserError for one that there is not."""
    found = context.token_type
    if found is None and pools.boundaries and context.token_id is not None:
        edges = torch.tensor(pools.boundaries, device=device)
        return torch.bucketize(context.token_id.to(device), edges, right=True)
    if found is None:
        return torch.zeros(context.num_tokens, dtype=torch.int64, device=device)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < pools.types:
        raise UserError(
            f"token types from {int(found.min())} to {int(found.max())} do not fit a router of "
            f"{pools.types} types"
        )
    return found.to(device)


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
        kind = token_types(context, self.pools, key.device)
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
        kind = token_types(context, self.pools, selection.device)
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

    def __init__(self, pools: TypePools, bias: TypedBias | None) -> None:
        self.pools, self.bias = pools, bias

    def __call__(self, routing: Routing, context: RouterContext) -> Routing:
        kind = token_types(context, self.pools, routing.token.device)
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

    Raises UserError for a record without types.
    """
    if TYPE not in routing.extra:
        raise UserError("a loss by type needs a router of types: moiie, ming or typed")
    losses = [loss(of_type(routing, int(n))) for n in routing.extra[TYPE].unique()]
    return torch.stack(losses).sum()


@register(
    "balance",
    "typed-balance-loss",
    title="Balance loss of each type of token over its own pool of experts",
    paper="MoIIE, arXiv:2508.09779",
    needs=("training",),
    limits="For routers moiie, ming and typed.",
)
def typed_balance_loss(routing: Routing) -> Tensor:
    """Sum over types of n * sum_i f_i P_i, n the experts that the type may use: 1 each at balance.

    Tokens of one type do not move the router of another. UserError for a record without types.
    """
    return by_type(routing, _pool_loss)


def _pool_loss(routing: Routing) -> Tensor:
    assert routing.logits is not None
    assert routing.token_mask is not None
    pool = routing.logits[routing.token_mask].isfinite().any(0).sum()
    return balance_loss(routing) * pool / routing.num_experts


@register(
    "router",
    "typed",
    title="A router for each type of token, over all experts or its own and shared ones",
    paper="MoIIE, arXiv:2508.09779; Ming-Flash-Omni, arXiv:2510.24821",
    needs=("training",),
    limits=_LIMITS,
    options={
        "types": "types of tokens",
        "boundaries": "first token ids of the types after the first, where the batch has no types",
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
    boundaries: list[int] | None = None,
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
    shared = num_experts if shared is None else shared
    pools = TypePools(num_experts, types, shared, tuple(boundaries or ()))
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
        edits=[RecordType(pools, bias)],
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
    options={"boundaries": "first token id of the second type, where the batch has no types"},
)
def moiie_router(
    width: int, num_experts: int, top_k: int, *, boundaries: list[int] | None = None
) -> nn.Module:
    """Half of the experts are shared, a quarter is for each of two types; renormalised."""
    if num_experts % 4:
        raise UserError(f"router 'moiie' needs experts in fours, not {num_experts}")
    return typed_router(width, num_experts, top_k, boundaries=boundaries, shared=num_experts // 2)


register_preset(
    typed_router,
    "ming",
    kind="router",
    title="A router each for text, image and audio tokens over one pool of experts",
    paper="Ming-Flash-Omni, arXiv:2510.24821",
    needs=("training",),
    limits=_LIMITS,
    settings={"types": 3},
    options=_options("boundaries", "weights", "bias_rate"),
)
