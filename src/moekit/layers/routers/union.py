"""Union of Experts: slices of one dense block, each of which processes part of the tokens.

UoE, arXiv 2503.02495. `moekit upcycle` cuts dense blocks into such slices without loss. In the
released code the router only orders tokens, gets no gradient and stays as it was drawn; here its
weights multiply what the slices give, unless `gated` is off.

Letters: B sequences, S positions, T = B * S tokens, E slices, K chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..names import one_of
from ..router import Choice, PipelineRouter
from ..score import LinearScore
from ..select import TopK, ragged_choice
from ..squash import softmax
from ..weigh import RawWeights
from .units import SegmentUnits

NORMALISED = ("none", "batch")


class KeptScores:
    """The best `top_k` scores of every token, the others 0: [B, S, E].

    With `normalised` "batch" they are divided by their slice's sum at the same position of all
    sequences, as released; what a token gets then depends on the other sequences.
    """

    def __init__(self, top_k: int, normalised: str) -> None:
        self.top_k, self.normalised = top_k, normalised

    def __call__(self, scores: Tensor, context: RouterContext) -> Tensor:
        best, ids = scores.topk(self.top_k, dim=-1)
        kept = torch.zeros_like(scores).scatter(-1, ids, best)
        if context.token_mask is not None:
            kept = kept * context.token_mask[:, None]
        columns = kept.view(context.batch, context.length, -1)
        if self.normalised == "batch":
            columns = columns / columns.sum(0, keepdim=True).clamp_min(1e-8)
        return columns


class BestPositions:
    """Every slice takes the share `fraction` of each sequence's tokens that scores highest for it.

    Padding is not taken, and neither is a token that scores nothing.
    """

    causal = False

    def __init__(self, kept: KeptScores, fraction: float) -> None:
        self.kept, self.fraction = kept, fraction
        self.top_k = kept.top_k
        self.sees_batch = kept.normalised == "batch"

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        columns = self.kept(selection, context)
        taken = max(1, math.floor(context.length * self.fraction))
        scores, places = columns.topk(taken, dim=1)
        chosen = torch.zeros_like(columns, dtype=torch.bool).scatter(1, places, scores > 0)
        return ragged_choice(chosen.flatten(0, 1), columns.flatten(0, 1))


class KeptWeights:
    """The kept scores of the chosen pairs."""

    def __init__(self, kept: KeptScores) -> None:
        self.kept = kept

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        return self.kept(scores, context).flatten(0, 1)[choice.unit, choice.expert]


class EqualWeights:
    """Weight 1 for every pair: as released, nothing teaches the router."""

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        return scores.new_ones(len(choice.unit))


@register(
    "router",
    "uoe-data",
    title="Slices take the tokens of a sequence that score highest for them",
    paper="Union of Experts, arXiv:2503.02495",
    needs=("training",),
    limits="Not causal; for a causal model use softmax-raw over the slices.",
    options={
        "fraction": "share of a sequence that a slice takes at most",
        "normalised": "scores divided by their sum over: none, or batch as released",
        "gated": "weights multiply the slices' outputs; off as released: nothing is learned",
    },
)
def data_selection_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    fraction: float = 0.5,
    normalised: str = "none",
    gated: bool = True,
) -> nn.Module:
    """Of each token's best `top_k` scores, every slice takes its best tokens of a sequence."""
    one_of("normalised", normalised, NORMALISED)
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction} is not above 0 and at most 1")
    kept = KeptScores(top_k, normalised)
    return PipelineRouter(
        num_experts,
        score=LinearScore(width, num_experts),
        squash=softmax,
        select=BestPositions(kept, fraction),
        weigh=KeptWeights(kept) if gated else EqualWeights(),
    )


@register(
    "router",
    "uoe-sequence",
    title="One choice of slices for a whole sequence",
    paper="Union of Experts, arXiv:2503.02495",
    needs=("training",),
    limits="Not causal. By the sequence's mean; the release flattens it and so fixes its length.",
    options={"gated": "weights multiply the slices' outputs; off as released: nothing is learned"},
)
def sequence_selection_router(
    width: int, num_experts: int, top_k: int, *, gated: bool = True
) -> nn.Module:
    """Top-k of a softmax of the mean hidden state of a sequence."""
    return PipelineRouter(
        num_experts,
        units=SegmentUnits(width, None, "mean", 0),
        score=LinearScore(width, num_experts),
        squash=softmax,
        select=TopK(top_k),
        weigh=RawWeights() if gated else EqualWeights(),
    )
