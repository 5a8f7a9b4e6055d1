"""Losses on the load of experts and on the router's probabilities: pure functions of a `Routing`.

A loss of this kind takes a `Routing` and options. One with a parameter `share` [E] reads loads from
there when a wider scope than this micro-batch counted them (see `scope`). Means are over tokens;
f is the share of pairs that an expert gets and sums to 1, P the mean probability.

Shapes: T tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moekit.core.registry import register, register_preset

from ..routing import Routing
from .load import at_balance, load_share, mean_of, probabilities, router_logits, share_of

FREE = ("each", "mean")


@register(
    "balance",
    "balance-loss",
    title="Auxiliary loss on the product of load and router probability",
    paper="Switch Transformer, arXiv:2101.03961",
    needs=("training",),
    options={
        "groups": "groups of neighbouring experts that are balanced as one; None: each expert",
        "first_choice": "count only the first choice of a token",
        "free": "loads of experts without work: each its own, or the mean of all of them",
        "free_weight": "weight of experts without work, below 1 to use them more",
    },
)
@at_balance(lambda experts, top_k: 1.0)
def balance_loss(
    routing: Routing,
    *,
    share: Tensor | None = None,
    groups: int | None = None,
    first_choice: bool = False,
    free: str = "each",
    free_weight: float = 1.0,
) -> Tensor:
    """E * sum_i f_i P_i: 1 at perfect balance, E at collapse.

    With `groups` sum over groups of (mean of E f_i) * (sum of P_i), the device loss of DeepSeekMoE
    (arXiv 2401.06066). Experts of cost 0 are `free`: AdaMoE (arXiv 2406.13233) does not balance
    them among each other, MoE++ (arXiv 2410.07348) weighs them by `free_weight`.
    """
    if share is None:
        share = share_of(_first_counts(routing)) if first_choice else load_share(routing)
    share = share.to(routing.weight.device)
    if routing.cost is not None and (free == "mean" or free_weight != 1.0):
        idle = (routing.cost == 0).to(share.dtype)
        if free == "mean":
            mean = (share * idle).sum() / idle.sum().clamp_min(1)
            share = torch.where(idle > 0, mean, share)
        share = share * (1 - idle + free_weight * idle)
    probability = mean_of(probabilities(routing))
    experts = share.shape[-1]
    if groups is not None:
        share = share.unflatten(-1, (groups, -1)).mean(-1)
        probability = probability.unflatten(-1, (groups, -1)).sum(-1)
    return experts * (share * probability).sum()


def _first_counts(routing: Routing) -> Tensor:
    first = routing.rank() == 0
    token, expert = routing.token[first], routing.expert[first]
    real = torch.ones(expert.shape, device=expert.device)
    if routing.token_mask is not None:
        real = routing.token_mask[token].to(real.dtype)
    return torch.zeros(routing.num_experts, device=expert.device).index_add(0, expert, real)


for _name, _title, _paper, _settings in (
    (
        "first-choice-loss",
        "Balance loss that counts only first choices",
        "GShard, arXiv:2006.16668",
        {"first_choice": True},
    ),
    (
        "null-mean-loss",
        "Balance loss that does not balance null experts among each other",
        "AdaMoE, arXiv:2406.13233",
        {"free": "mean"},
    ),
    (
        "heterogeneous-loss",
        "Balance loss that prefers experts without work",
        "MoE++, arXiv:2410.07348",
        {"free_weight": 0.75},
    ),
):
    register_preset(
        balance_loss,
        _name,
        kind="balance",
        title=_title,
        paper=_paper,
        needs=("training",),
        settings=_settings,
    )


@register(
    "balance",
    "top1-loss",
    title="Squared soft load over the mean largest probability, which a flat router cannot win",
    paper="Sigma-MoE-Tiny, arXiv:2512.16248",
    needs=("training",),
    options={"temperature": "of the softmax; below 1 it sharpens"},
)
@at_balance(lambda experts, top_k: float(top_k))
def top1_loss(routing: Routing, *, temperature: float = 1.0) -> Tensor:
    """E * sum_i p_i^2 / m with p_i the mean probability of expert i and m that of the largest.

    1 where every token is sure and the load even, E at collapse, and E where all is flat.
    """
    sharp = (router_logits(routing) / temperature).softmax(-1)
    return sharp.shape[-1] * mean_of(sharp).square().sum() / mean_of(sharp.amax(-1)).clamp_min(1e-9)


@register(
    "balance",
    "importance-loss",
    title="Squared coefficient of variation of the summed probabilities",
    paper="Sparsely-Gated MoE, arXiv:1701.06538",
    needs=("training",),
)
@at_balance(lambda experts, top_k: 0.0)
def importance_loss(routing: Routing) -> Tensor:
    """Variance over squared mean of the experts' mean probabilities: 0 when they are equal."""
    probability = mean_of(probabilities(routing))
    return probability.var(correction=0) / probability.mean().square().clamp_min(1e-20)


@register(
    "balance",
    "z-loss",
    title="Loss on the size of the router logits",
    paper="ST-MoE, arXiv:2202.08906",
    needs=("training",),
)
def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the router logits; of a masked logit, -inf, there is no part."""
    return mean_of(router_logits(routing).logsumexp(-1).square())


@register(
    "balance",
    "entropy-loss",
    title="Mean entropy of the router: fewer experts a token where a threshold chooses",
    paper="Harder Tasks Need More Experts, arXiv:2403.07652",
    needs=("training",),
)
@at_balance(lambda experts, top_k: math.log(top_k))
def entropy_loss(routing: Routing) -> Tensor:
    """Mean over tokens of the entropy of their probabilities: 0 when sure, log E when flat."""
    return mean_of(entropy(probabilities(routing)))


@register(
    "balance",
    "mutual-information",
    title="Minus the information that a token has about its expert: even on average, sure by token",
    paper="ModuleFormer, arXiv:2306.04640",
    needs=("training",),
)
@at_balance(lambda experts, top_k: math.log(top_k) - math.log(experts))
def mutual_information_loss(routing: Routing) -> Tensor:
    """Mean entropy by token minus entropy of the mean: 0 if all tokens agree, down to -log E."""
    made = probabilities(routing)
    return mean_of(entropy(made)) - entropy(mean_of(made))


@register(
    "balance",
    "concentration",
    title="Entropy of the mean probability: fine-tuning gathers on few experts",
    paper="ModuleFormer, arXiv:2306.04640",
    needs=("training",),
)
@at_balance(lambda experts, top_k: math.log(experts))
def concentration_loss(routing: Routing) -> Tensor:
    """Entropy of the mean probability, in nats: log E at balance, 0 on one expert."""
    return entropy(mean_of(probabilities(routing)))


@register(
    "balance",
    "compute-budget",
    title="Distance of the expected work a token from a budget",
    paper="AS-ViT, arXiv:2209.13802",
    needs=("training",),
    limits="For routers whose number of working experts varies: thresholds, null experts.",
    options={"budget": "work to aim at, as a share of all chosen experts working"},
)
def compute_budget(routing: Routing, *, budget: float) -> Tensor:
    """|expected work / work if every pair had the costliest expert - budget|, through the scores.

    The expected work of a token is its probability-weighted mean cost. Not a matter of balance:
    with equal costs it is |1 - budget| whatever the load.
    """
    if routing.cost is None:
        raise ValueError("this routing has no costs; the layer that made it sets them")
    cost = routing.cost.to(routing.weight.device)
    relative = cost / cost.max().clamp_min(1)
    return ((mean_of(probabilities(routing)) * relative).sum() - budget).abs()


def entropy(probability: Tensor) -> Tensor:
    """Entropy over the last axis, in nats; terms of probability 0 are 0."""
    return -torch.special.xlogy(probability, probability.clamp_min(1e-30)).sum(-1)
