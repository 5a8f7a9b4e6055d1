"""Balancing without a loss: a bias [E] that only the choice sees, moved after every step.

One step is a (sub)gradient step on the dual of the assignment problem "greatest total affinity with
every expert at its fair share" (ALF-LB, arXiv 2512.03915): the dual's gradient by an expert's bias
is its load less the fair share. Adding a constant to the bias changes no choice.

Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moekit.core.registry import register

# The direction by rule, for pairs a expert [E] and the number of this update, from 1.
BIAS_STEPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sign": lambda counts, number: torch.sign(_lack(counts)),
    "proportional": lambda counts, number: _lack(counts),
    "sign-sqrt": lambda counts, number: torch.sign(_lack(counts)) / math.sqrt(number),
    "proportional-sqrt": lambda counts, number: _lack(counts) / math.sqrt(number),
    "sign-inverse": lambda counts, number: torch.sign(_lack(counts)) / number,
    "proportional-inverse": lambda counts, number: _lack(counts) / number,
}


def _lack(counts: Tensor) -> Tensor:
    """How far every expert is below its fair share, as a part of it."""
    mean = counts.mean(-1, keepdim=True)
    return (mean - counts) / mean.clamp_min(1)


@register(
    "balance",
    "expert-bias",
    title="Loss-free balancing by a bias that only affects the choice",
    paper="Loss-free balancing, arXiv:2408.15664; ALF-LB, arXiv:2512.03915",
    needs=("training",),
    limits="A step and no loss: a stock family's correction bias, or a router with a bias_rate.",
    options={
        "rule": f"direction and size of a step: {', '.join(BIAS_STEPS)}",
        "number": "of this update, from 1",
        "centre": "keep the mean at 0",
        "limit": "largest size of the bias; None: unbounded",
    },
)
@torch.no_grad()
def move_bias(
    bias: Tensor,
    counts: Tensor,
    rate: float,
    *,
    rule: str = "sign",
    number: int = 1,
    centre: bool = False,
    limit: float | None = None,
) -> None:
    """Raise the bias [E] of underloaded experts and lower that of the others, in place.

    `counts` [E] of the last step over all processes; `rule` names one of `BIAS_STEPS` (loss-free
    balancing, arXiv 2408.15664, is "sign"; those that shrink with the update's `number` converge).
    `centre` keeps the mean at 0. `limit` bounds |bias|: at extreme sparsity a bias can grow until
    it decides alone (Sigma-MoE-Tiny, arXiv 2512.16248).
    """
    step = BIAS_STEPS[rule](counts.float(), number)
    bias.add_(step.to(bias.dtype), alpha=rate)
    if centre:
        bias.sub_(bias.mean(-1, keepdim=True))
    if limit is not None:
        bias.clamp_(-limit, limit)


def dual_value(affinity: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The dual that the bias minimises: sum_t of the K largest (affinity + bias) - c sum(bias).

    `affinity` [T, E], `bias` [E], c = K T / E. Its least value is the greatest total affinity with
    every expert chosen c times; its gradient by the bias, away from ties, is the load less c.
    """
    fair = top_k * affinity.shape[0] / affinity.shape[1]
    return (affinity + bias).topk(top_k, -1).values.sum() - fair * bias.sum()
