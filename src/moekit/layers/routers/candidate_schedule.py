"""Random candidates whose number grows in training (ReXMoE, arXiv:2510.17483)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..router import PartList
from ..terms import NEVER
from .pipeline import pipeline_router


def candidate_count(step: int, start: int, end: int, first: int, last: int) -> int:
    """Number of candidates at `step`: `first` until `start`, then linearly to `last` at `end`."""
    if step >= end:
        return last
    progress = max(0, step - start) / (end - start)
    return math.floor(first + (last - first) * progress)


class RandomCandidates:
    """In training only so many experts, drawn for every step and layer, may be chosen.

    The draw is over the whole pool, so that even at first a layer uses its neighbours' experts.
    """

    def __init__(self, first: int, start: int, end: int) -> None:
        self.first, self.start, self.end = first, start, end

    def __call__(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        if not context.training:
            return selection
        experts = selection.shape[1]
        count = candidate_count(context.step, self.start, self.end, self.first, experts)
        drawn = torch.randperm(experts, generator=context.step_generator("candidates"))
        masked = drawn[count:].to(selection.device)
        return selection.index_fill(1, masked, NEVER)


@register(
    "router",
    "rexmoe",
    title="Experts shared by neighbouring layers, of which ever more are candidates in training",
    paper="ReXMoE, arXiv:2510.17483",
    needs=("training",),
    limits="Share experts between layers with the layers' own option; alone, this is the control.",
    options={
        "candidates": "candidates at first, by the paper one layer's experts; None: always all",
        "start": "step until which their number stays",
        "end": "step from which all experts are candidates",
        "weights": "weights of the chosen experts: raw or renormalised",
        "bias_rate": "step of the loss-free bias; 0: no bias",
    },
)
def candidate_schedule_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    candidates: int | None = None,
    start: int = 10000,
    end: int = 30000,
    weights: str = "raw",
    bias_rate: float = 0.0,
) -> nn.Module:
    """Top-k of a softmax among `RandomCandidates`: the progressive scaling routing of ReXMoE.

    Raises UserError where `candidates` is below `top_k` or `end` not after `start`.
    """
    router: Any = pipeline_router(width, num_experts, top_k, weights=weights, bias_rate=bias_rate)
    if candidates is None:
        return router
    if not top_k <= candidates <= num_experts:
        raise UserError(
            f"candidates {candidates} is not between top_k {top_k} and the {num_experts} experts"
        )
    if not 0 <= start < end:
        raise UserError(f"start {start} and end {end} are not two steps in this order")
    # Last of the terms: a bias must not bring a masked expert back (minus infinity stays so).
    router.terms = PartList([*router.terms, RandomCandidates(candidates, start, end)])
    return router
