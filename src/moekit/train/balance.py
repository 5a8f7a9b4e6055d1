"""Keeping routers balanced during training, by the rule that each family uses itself.

Letters: T tokens, E experts, K chosen experts, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.layers import MoekitConfig, Routing

from .recipe import BalanceRecipe


@dataclass(frozen=True)
class Balance:
    """The rule in force: a loss with `coefficient`, a bias moved by `bias_rate`, or neither."""

    coefficient: float
    bias_rate: float
    z_loss: float


def family_balance(
    recipe: BalanceRecipe, config, has_bias: bool, self_balanced: bool = False
) -> Balance:
    """The balance rule for a model: its family's own, unless the recipe says otherwise.

    A family with a correction bias is balanced by moving it; one whose config declares
    `router_aux_loss_coef` by the loss; any other, and one whose routers are `self_balanced`, is
    left alone.
    """
    declared = getattr(config, "router_aux_loss_coef", None)
    rule = recipe.rule
    if isinstance(config, MoekitConfig) and rule == "bias":
        raise UserError(
            "balance.rule is 'bias', but moekit's routers carry their own: choose one with a "
            "bias_rate, such as loss-free, and balance.rule 'none'."
        )
    if rule == "family" and self_balanced:
        rule = "none"
    elif rule == "family":
        rule = "bias" if has_bias else "loss" if declared is not None else "none"
    if rule == "bias" and not has_bias:
        raise UserError(
            f"balance.rule is 'bias', but {config.model_type} has no correction bias; use 'loss'."
        )
    coefficient = 0.0
    if rule == "loss":
        coefficient = recipe.coefficient if recipe.coefficient is not None else declared or 0.0
    return Balance(coefficient, recipe.bias_rate if rule == "bias" else 0.0, recipe.z_loss)


@register(
    "balance",
    "balance-loss",
    title="Auxiliary loss on the product of load and router probability",
    paper="Switch Transformer, arXiv:2101.03961",
    needs=("training",),
)
def balance_loss(routing: Routing) -> Tensor:
    """Load-balancing loss of one layer (Switch, arXiv 2101.03961, for K choices).

    E * sum_i f_i * P_i with f_i the share of pairs that wanted expert i, dropped ones too, and P_i
    its mean probability: 1 at perfect balance, E at collapse.
    """
    counts = routing.wanted()
    probability = mean_probability(routing)
    return routing.num_experts * (counts / counts.sum() * probability).sum()


@register(
    "balance",
    "z-loss",
    title="Loss on the size of the router logits",
    paper="ST-MoE, arXiv:2202.08906",
    needs=("training",),
)
def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)."""
    return real_rows(routing).logsumexp(-1).square().mean()


def mean_probability(routing: Routing) -> Tensor:
    """The mean softmax of the router's logits [E]."""
    return real_rows(routing).softmax(-1).mean(0)


def real_rows(routing: Routing) -> Tensor:
    """The router's logits [U, E] without those of padding, in float32."""
    assert routing.logits is not None
    logits, mask = routing.logits.float(), routing.unit_mask()
    return logits if mask is None else logits[mask]


@register(
    "balance",
    "expert-bias",
    title="Loss-free balancing by a bias that only affects the choice",
    paper="Loss-free balancing, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437",
    needs=("training",),
    limits="Needs a family whose router has a correction bias.",
)
@torch.no_grad()
def move_bias(biases: list[nn.Parameter | Tensor], counts: list[Tensor], rate: float) -> None:
    """Raise the correction bias of underloaded experts and lower the others' by `rate`.

    `counts` [E] by layer are those of the last step, summed over all processes (DeepSeek-V3, arXiv
    2412.19437).
    """
    for bias, count in zip(biases, counts, strict=True):
        bias.add_(torch.sign(count.mean() - count).to(bias.dtype), alpha=rate)
