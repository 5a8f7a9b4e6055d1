"""Product keys: an expert for every pair of two sets of half-experts (Monet, arXiv 2412.04139).

Cost and parameters grow with the square root of the number of experts.

Letters: T tokens, D width, H heads, E = n1 * n2 composed experts of sets of n1 and n2 half-experts;
expert i * n2 + j is made of half-experts i and j.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..routing import Routing
from ..select import ragged_choice
from ..terms import NEVER

FIRST, SECOND = "first_gates", "second_gates"
LOGITS = ("first_logits", "second_logits")
CARRY = "product keys"


def set_sizes(num_experts: int, first: int | None) -> tuple[int, int]:
    """Sizes of the two sets; by default as equal as `num_experts` allows, the first the smaller.

    Raises UserError where `first` does not divide.
    """
    if first is None:
        first = max(n for n in range(1, math.isqrt(num_experts) + 1) if num_experts % n == 0)
    if first < 1 or num_experts % first:
        raise UserError(f"first {first} does not divide the {num_experts} composed experts")
    return first, num_experts // first


def threshold(kept: int, size: int) -> float:
    """Where a standard normal variable lies above with probability `kept` / `size`."""
    return NEVER if kept >= size else NormalDist().inv_cdf(1 - kept / size)


class HeadNorm(nn.Module):
    """Logits [T, H, n] as standard scores, with mean and variance by head.

    Of the batch in training, without padding, pooled over tokens and half-experts; running ones
    otherwise, which a step that recomputes its activations moves twice.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, heads: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(heads))
        self.register_buffer("variance", torch.ones(heads))

    @torch.no_grad()
    def forward(self, logits: Tensor, context: RouterContext) -> Tensor:
        mean, variance = self.mean, self.variance
        if context.training:
            mask = context.token_mask
            real = logits if mask is None else logits[mask]
            variance, mean = torch.var_mean(real, (0, 2), correction=0)
            self.mean.lerp_(mean, self.momentum)
            self.variance.lerp_(variance, self.momentum)
        return (logits - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()


def kept_gates(logits: Tensor, standard: Tensor, limit: float) -> Tensor:
    """Softmax of `logits` [T, H, n] over the entries whose `standard` score reaches `limit`.

    At least the largest of a head is kept.
    """
    best = standard.amax(-1, keepdim=True)
    return logits.masked_fill(standard < best.clamp(max=limit), NEVER).softmax(-1)


class ProductKeyRouter(nn.Module):
    """H heads choose half-experts in both sets; a composed expert weighs sum_h first_hi second_hj.

    About `kept` half-experts of a set pass a threshold on normalised logits, so that no sorting is
    needed. The record holds both gates in `extra`; its pairs are the strongest composed expert of
    every head or, with `explicit`, all of them. `weight` [H, n1 + n2, D].
    """

    def __init__(
        self, width: int, sizes: tuple[int, int], kept: int, heads: int, explicit: bool
    ) -> None:
        super().__init__()
        self.sizes, self.explicit = sizes, explicit
        self.limits = [threshold(kept, size) for size in sizes]
        self.weight = nn.Parameter(torch.empty(heads, sum(sizes), width))
        self.norms = nn.ModuleList(HeadNorm(heads) for _ in sizes)
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    @property
    def causal(self) -> bool:
        # Statistics of the batch read every token; running ones do not.
        return not self.training

    @property
    def sees_batch(self) -> bool:
        return self.training

    @property
    def decodes(self) -> bool:
        return True

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of `hidden` [T, D]."""
        with torch.autocast(hidden.device.type, enabled=False):
            key = (hidden if context.key is None else context.key).float()
            logits = F.linear(key, self.weight.float().flatten(0, 1))
            parts = logits.unflatten(-1, self.weight.shape[:2]).split(self.sizes, -1)
            gates = [
                kept_gates(part, norm(part, context), limit)
                for part, norm, limit in zip(parts, self.norms, self.limits, strict=True)
            ]
        extra = dict(zip((FIRST, SECOND, *LOGITS), (*gates, *parts), strict=True))
        context.carry[CARRY] = extra
        return self.record(extra, context)

    def record(self, extra: dict[str, Tensor], context: RouterContext) -> Routing:
        """The routing that the gates in `extra` amount to."""
        token, expert, weight, top_k = all_pairs(extra) if self.explicit else strongest_pairs(extra)
        return Routing(
            token,
            expert,
            weight,
            num_tokens=len(extra[FIRST]),
            num_experts=self.sizes[0] * self.sizes[1],
            top_k=top_k,
            token_mask=context.token_mask,
            cost=context.cost,
            layer=context.layer,
            round=context.round,
            extra={} if self.explicit else extra,
        )

    def after_step(self, counts: Tensor) -> None:
        """Nothing moves but the running statistics, which the forward pass keeps."""


class ReusedKeys(ProductKeyRouter):
    """The decision of the last product-key router of an earlier layer."""

    def __init__(self, sizes: tuple[int, int], explicit: bool) -> None:
        nn.Module.__init__(self)
        self.sizes, self.explicit = sizes, explicit

    def init_weights_with(self, std: float) -> None:
        pass

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        extra = context.carry.get(CARRY)
        if extra is None:
            raise UserError(
                f"layer {context.layer}: router 'monet' with reuse needs one without in an "
                "earlier layer"
            )
        if (extra[FIRST].shape[-1], extra[SECOND].shape[-1]) != self.sizes:
            raise UserError(f"layer {context.layer} reuses a router of other sets of half-experts")
        return self.record(extra, context)


def composed_weights(extra: dict[str, Tensor]) -> Tensor:
    """Weight of every composed expert, written out: [T, n1, n2]."""
    return torch.einsum("thi,thj->tij", extra[FIRST], extra[SECOND])


def all_pairs(extra: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Every composed expert with a weight: token, expert, weight [N] and no common number."""
    weights = composed_weights(extra).flatten(1)
    token, expert, _ = ragged_choice(weights > 0, weights)
    return token, expert, weights[token, expert], None


def strongest_pairs(extra: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """The strongest composed expert of every head; heads that agree are one pair."""
    (one, i), (two, j) = (extra[name].max(-1) for name in (FIRST, SECOND))
    heads = one.shape[1]
    expert = i * extra[SECOND].shape[-1] + j
    # Heads as rows and columns: the first of those that agree takes the weight of all.
    same = expert[:, :, None] == expert[:, None, :]
    leads = ~(same.tril(-1).any(-1))
    weight = (same * (one * two)[:, None, :]).sum(-1)
    order = weight.masked_fill(~leads, NEVER).argsort(dim=-1, descending=True, stable=True)
    token, place = leads.gather(-1, order).nonzero(as_tuple=True)
    head = order[token, place]
    return token, expert[token, head], weight[token, head], 1 if heads == 1 else None


def _real(values: Tensor, routing: Routing) -> Tensor:
    return values if routing.token_mask is None else values[routing.token_mask]


def _check(routing: Routing) -> None:
    if FIRST not in routing.extra:
        raise UserError("a loss on half-experts needs router 'monet', not explicit")


@register(
    "balance",
    "half-expert-uniformity",
    title="Mean probability of the half-experts is uniform",
    paper="Monet, arXiv:2412.04139",
    needs=("training",),
    limits="For router monet.",
)
def uniformity_loss(routing: Routing) -> Tensor:
    """Mean over sets, heads and half-experts of -log of the mean probability: log n at balance.

    Of the softmax over all half-experts, so that those below the threshold get a gradient too.
    UserError for a record without product keys.
    """
    _check(routing)
    means = [_real(routing.extra[name], routing).softmax(-1).mean(0) for name in LOGITS]
    return -torch.stack([mean.log().mean() for mean in means]).mean()


@register(
    "balance",
    "half-expert-ambiguity",
    title="Every head decides for one half-expert of each set",
    paper="Monet, arXiv:2412.04139",
    needs=("training",),
    limits="For router monet.",
)
def ambiguity_loss(routing: Routing) -> Tensor:
    """Mean over tokens, heads and sets of one less the largest gate: 0 where heads are certain.

    UserError for a record without product keys.
    """
    _check(routing)
    largest = [_real(routing.extra[name], routing).amax(-1) for name in (FIRST, SECOND)]
    return 1 - torch.stack([gate.mean() for gate in largest]).mean()


@register(
    "router",
    "monet",
    title="Heads choose half-experts in two sets; every pair of them is an expert",
    paper="Monet, arXiv:2412.04139",
    needs=("training",),
    limits=(
        "For the experts monet-horizontal and monet-vertical. In training the threshold reads "
        "statistics of the batch, later tokens among them."
    ),
    options={
        "heads": "decisions that add up",
        "first": "half-experts of the first set; None: about the square root of the experts",
        "explicit": "list every composed expert with its weight, for other experts and masks",
        "reuse": "no router of its own: the decision of the last one before",
    },
)
def product_key_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    heads: int = 2,
    first: int | None = None,
    explicit: bool = False,
    reuse: bool = False,
) -> nn.Module:
    """`num_experts` composed experts; about `top_k` half-experts of each set pass in a head."""
    sizes = set_sizes(num_experts, first)
    if heads < 1:
        raise UserError(f"heads {heads} is below 1")
    if reuse:
        return ReusedKeys(sizes, explicit)
    return ProductKeyRouter(width, sizes, top_k, heads, explicit)
