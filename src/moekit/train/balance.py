"""Keeping routers balanced during training, by the rule that each family uses itself.

Letters: T tokens, E experts, K chosen experts, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from .recipe import BalanceRecipe


@dataclass(frozen=True)
class Balance:
    """The rule in force: a loss with `coefficient`, a bias moved by `bias_rate`, or neither."""

    coefficient: float
    bias_rate: float
    z_loss: float


def family_balance(recipe: BalanceRecipe, config, has_bias: bool) -> Balance:
    """The balance rule for a model: its family's own, unless the recipe says otherwise.

    A family with a correction bias is balanced by moving it; one whose config declares
    `router_aux_loss_coef` by the loss; any other is left alone.
    """
    declared = getattr(config, "router_aux_loss_coef", None)
    rule = recipe.rule
    if rule == "family":
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
def balance_loss(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """Load-balancing loss of one layer (Switch, arXiv 2101.03961, for K choices).

    `logits` [T, E] before the softmax, `topk_ids` [T, K]. E * sum_i f_i * P_i with f_i the share
    of pairs sent to expert i and P_i its mean probability: 1 at perfect balance, E at collapse.
    """
    num_experts = logits.shape[-1]
    share = expert_counts(topk_ids, num_experts) / topk_ids.numel()
    return num_experts * (share * logits.float().softmax(-1).mean(0)).sum()


@register(
    "balance",
    "z-loss",
    title="Loss on the size of the router logits",
    paper="ST-MoE, arXiv:2202.08906",
    needs=("training",),
)
def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of router `logits` [T, E] (ST-MoE, arXiv 2202.08906)."""
    return logits.float().logsumexp(-1).square().mean()


def expert_counts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """How many of the pairs `topk_ids` [T, K] go to each expert: float32 [E]."""
    flat = topk_ids.reshape(-1)
    zeros = torch.zeros(num_experts, dtype=torch.float32, device=flat.device)
    return zeros.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))


@register(
    "balance",
    "expert-bias",
    title="Loss-free balancing by a bias that only affects the choice",
    paper="Loss-free balancing, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437",
    needs=("training",),
    limits="Needs a family whose router has a correction bias.",
)
@torch.no_grad()
def move_bias(biases: list[nn.Parameter | Tensor], counts: Tensor, rate: float) -> None:
    """Raise the correction bias of underloaded experts and lower the others' by `rate`.

    `counts` [L, E] of the last step, summed over all processes (DeepSeek-V3, arXiv 2412.19437).
    """
    for bias, count in zip(biases, counts, strict=True):
        bias.add_(torch.sign(count.mean() - count).to(bias.dtype), alpha=rate)
