"""The router pipeline with its standard parts chosen by options: the kernel of many routers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..balance.bias import BIAS_STEPS
from ..edits import ORDERS, Capacity, SecondThinning
from ..names import one_of
from ..router import PipelineRouter
from ..score import CosineScore, LinearScore, MLPScore
from ..select import ExpertChoice, GroupQuota, TopK, TopP
from ..squash import SQUASH
from ..terms import ExpertBias, GroupLimit, Noise
from ..weigh import WEIGHTS

SCORES = ("linear", "mlp", "cosine")
SELECTIONS = ("top-k", "top-p", "group-quota", "expert-choice")


@register(
    "router",
    "pipeline",
    title="Score, squash, terms of the choice, selection, weights and capacity, each an option",
    needs=("training",),
    options={
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
        "score": f"where logits come from: {', '.join(SCORES)}",
        "score_width": "width between the two layers of score mlp",
        "squash": f"from logits to scores: {', '.join(SQUASH)}",
        "select": f"rule of selection: {', '.join(SELECTIONS)}",
        "threshold": "sum of scores at which top-p stops",
        "within": "tokens that expert choice compares: batch or sequence",
        "cap": "with expert choice, the most experts of one token; None: any number",
        "groups": "equal groups of experts",
        "keep_groups": "groups that a token may choose in",
        "group_score": "a group is as good as its best expert (max) or its best two (top2)",
        "bias_rate": "step of the loss-free bias; 0: no bias",
        "bias_rule": f"how the bias moves: {', '.join(BIAS_STEPS)}",
        "bias_limit": "largest size of the bias; None: unbounded",
        "jitter": "in training, the router's input times 1 +- this",
        "noise": "in training, gaussian noise on the choice",
        "capacity": "pairs of an expert over its fair share, in training; None: dropless",
        "eval_capacity": "the same outside of training",
        "order": f"who gets a place first: {', '.join(ORDERS)}",
        "thin_second": "in training, keep later choices with probability twice their weight",
        "scale": "factor on the weights",
    },
)
def pipeline_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    weights: str,
    score: str = "linear",
    score_width: int = 256,
    squash: str = "softmax",
    select: str = "top-k",
    threshold: float = 0.4,
    within: str = "batch",
    cap: int | None = None,
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "max",
    bias_rate: float = 0.0,
    bias_rule: str = "sign",
    bias_limit: float | None = None,
    jitter: float = 0.0,
    noise: float = 0.0,
    capacity: float | None = None,
    eval_capacity: float | None = None,
    order: str = "choice",
    thin_second: bool = False,
    scale: float = 1.0,
) -> nn.Module:
    """A `PipelineRouter` of standard parts.

    `top_k` is the number of experts a token, with top-p the largest number, with expert choice the
    average. Raises UserError for values that fit neither each other nor the number of experts.
    """
    for what, value, known in (
        ("weights", weights, WEIGHTS),
        ("score", score, SCORES),
        ("squash", squash, SQUASH),
        ("select", select, SELECTIONS),
        ("within", within, ("batch", "sequence")),
        ("group_score", group_score, ("max", "top2")),
        ("bias_rule", bias_rule, BIAS_STEPS),
        ("order", order, ORDERS),
    ):
        one_of(what, value, known)
    if weights == "renormalised" and top_k == 1 and select == "top-k":
        raise UserError(
            "weights renormalised with top_k 1 make every weight 1, so the router never learns; "
            "use weights raw"
        )
    for what, number in (("capacity", capacity), ("eval_capacity", eval_capacity)):
        if number is not None and number <= 0:
            raise UserError(f"{what} {number} leaves no place; leave it out for a dropless layer")
    if cap is not None and cap < top_k:
        raise UserError(f"cap {cap} is below top_k {top_k}, the average that experts take")
    check_groups(num_experts, top_k, groups, keep_groups, quota=select == "group-quota")
    scorers: dict[str, Any] = {
        "linear": functools.partial(LinearScore, jitter=jitter),
        "mlp": functools.partial(MLPScore, hidden=score_width),
        "cosine": CosineScore,
    }
    terms: list[Any] = []
    if bias_rate:
        terms.append(ExpertBias(num_experts, bias_rate, rule=bias_rule, limit=bias_limit))
    if noise:
        terms.append(Noise(noise))
    if keep_groups < groups and select != "group-quota":
        terms.append(GroupLimit(groups, keep_groups, group_score))
    selections: dict[str, Callable[[], Any]] = {
        "top-k": lambda: TopK(top_k),
        "top-p": lambda: TopP(threshold, top_k),
        "group-quota": lambda: GroupQuota(top_k, groups),
        "expert-choice": lambda: ExpertChoice(top_k, within=within, cap=cap),
    }
    edits: list[Any] = [SecondThinning()] if thin_second else []
    if capacity is not None or eval_capacity is not None:
        edits.append(Capacity(capacity, order, top_k, eval_capacity))
    return PipelineRouter(
        num_experts,
        score=scorers[score](width, num_experts),
        squash=SQUASH[squash],
        terms=terms,
        select=selections[select](),
        weigh=WEIGHTS[weights](scale),
        edits=edits,
    )


def check_groups(num_experts: int, top_k: int, groups: int, keep: int, *, quota: bool) -> None:
    """UserError unless `num_experts` and `top_k` fit `groups` of which `keep` may be used."""
    if groups < 1 or num_experts % groups:
        raise UserError(f"groups {groups} does not divide the {num_experts} experts")
    if quota and top_k % groups:
        raise UserError(
            f"top_k {top_k} is not a multiple of groups {groups}, in each of which it takes as many"
        )
    if not quota and not 1 <= keep <= groups:
        raise UserError(f"keep_groups {keep} is not between 1 and groups {groups}")
    if not quota and keep * (num_experts // groups) < top_k:
        raise UserError(
            f"keep_groups {keep} of {groups} leaves {keep * (num_experts // groups)} experts, "
            f"fewer than top_k {top_k}"
        )
