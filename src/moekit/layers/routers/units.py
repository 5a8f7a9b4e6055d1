"""One decision for several tokens: segments (Seg-MoE) and chunks (Hydra).

Seg-MoE, arXiv 2601.21641; Hydra, arXiv 2508.15099. A segment that is routed by what its tokens say
reads later tokens of itself, so it is not causal; with `delay` 1 it takes the decision that the
segment before would have led to, and is.

Letters: B sequences, S positions, T = B * S tokens, U units, M units a sequence, D width,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register, register_preset, registry

from ..context import RouterContext
from ..names import one_of
from ..router import Choice, PipelineRouter
from ..score import LinearScore
from ..select import TopK
from ..squash import softmax
from ..weigh import WEIGHTS

KEYS = ("flatten", "mean")
DELAYS = (0, 1)


class SegmentUnits(nn.Module):
    """Units of `size` neighbouring tokens, the last one of a sequence maybe shorter.

    The key is all their hidden states side by side, zeros where there is no token ("flatten",
    [U, size * D]), or the mean over those that are there ("mean", [U, D]). `size` None is the
    whole sequence. With `delay` 1 a unit is given the key of the unit before it, the first of a
    sequence a learned one.
    """

    sees_batch = False

    def __init__(self, width: int, size: int | None, key: str, delay: int) -> None:
        super().__init__()
        self.size, self.key, self.delay = size, key, delay
        if delay:
            self.start = nn.Parameter(torch.empty(self.key_width(width)))
            self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        if self.delay:
            nn.init.normal_(self.start, std=std)

    @property
    def causal(self) -> bool:
        return self.size == 1 or self.delay > 0

    def key_width(self, width: int) -> int:
        return width * (self.size or 1) if self.key == "flatten" else width

    def forward(self, hidden: Tensor, context: RouterContext) -> tuple[Tensor, Tensor]:
        """Keys [U, Dk] and the unit of every token [T]."""
        check_whole(context, "routers of segments")
        rows = (hidden if context.key is None else context.key).float()
        size = self.size or context.length
        folded, real = fold(rows, context, size)
        if self.key == "flatten":
            keys = folded.flatten(2)
        else:
            keys = folded.sum(2) / real.sum(2).clamp(min=1)
        if self.delay:
            start = self.start.float().expand(len(keys), 1, -1)
            keys = torch.cat([start, keys[:, :-1]], 1)
        return keys.flatten(0, 1), unit_of_token(context, size, hidden.device)


def fold(rows: Tensor, context: RouterContext, size: int) -> tuple[Tensor, Tensor]:
    """Rows [T, D] as [B, M, size, D] with zeros for padding, and which are real [B, M, size, 1]."""
    mask = context.token_mask
    real = rows.new_ones(len(rows)) if mask is None else mask.to(rows.dtype)
    rows = rows if mask is None else rows.masked_fill(~mask[:, None], 0.0)
    missing = -context.length % size
    folded = F.pad(rows.view(context.batch, context.length, -1), (0, 0, 0, missing))
    real = F.pad(real.view(context.batch, context.length), (0, missing))
    return folded.unflatten(1, (-1, size)), real.view(context.batch, -1, size, 1)


def unit_of_token(context: RouterContext, size: int, device: torch.device) -> Tensor:
    """Which unit each token is in, units numbered through the batch: int64 [T]."""
    place = torch.arange(context.length, device=device) // size
    first = torch.arange(context.batch, device=device) * -(-context.length // size)
    return (first[:, None] + place).flatten()


def check_whole(context: RouterContext, what: str) -> None:
    """UserError where the sequences of the batch do not begin at position 0."""
    position = context.position
    if position is not None and bool((position.view(context.batch, -1)[:, 0] > 0).any()):
        raise UserError(f"{what} need whole sequences: generate with use_cache=False")


class ScaledScore(LinearScore):
    """Linear logits over a temperature."""

    def __init__(self, width: int, num_experts: int, temperature: float) -> None:
        super().__init__(width, num_experts)
        self.temperature = temperature

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        return super().forward(key, context) / self.temperature


class ScoreDropout:
    """Dropout on the scores, in training, as a term of the choice; `weights` must see it too."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        if not context.training:
            return selection
        generator = context.generator("score dropout", scores.device)
        draw = torch.rand(scores.shape, generator=generator, device=scores.device)
        return selection * (draw >= self.rate) / (1 - self.rate)


class DroppedWeights:
    """Weights by the rule `weigh` of the scores that `dropout` left."""

    def __init__(self, dropout: ScoreDropout, weigh: Callable) -> None:
        self.dropout, self.weigh = dropout, weigh

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        return self.weigh(self.dropout(scores, scores, context), choice, context)


@register(
    "router",
    "segment",
    title="One choice for a segment of tokens, by all their hidden states side by side",
    paper="Seg-MoE, arXiv:2601.21641",
    needs=("training",),
    limits="Not causal unless delayed or of size 1; whole sequences only (no key-value cache).",
    options={
        "size": "tokens a segment; None with key mean: the whole sequence",
        "key": f"what the router reads of a segment: {' or '.join(KEYS)}",
        "delay": "1: the decision of the segment before, so that the router is causal",
        "weights": "raw or renormalised; None as in the paper: raw for one expert, else the other",
        "temperature": "divides the logits",
        "dropout": "on the scores, in training",
    },
)
def segment_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    size: int | None = 4,
    key: str = "flatten",
    delay: int = 0,
    weights: str | None = None,
    temperature: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Top-k of a softmax for units of `size` tokens.

    Of size 1 this is the plain router bit for bit. Renormalised weights of one expert are refused:
    they are the constant 1, and the router would not learn from the task.
    """
    one_of("key", key, KEYS)
    weights = weights or ("raw" if top_k == 1 else "renormalised")
    one_of("weights", weights, WEIGHTS)
    if top_k == 1 and weights == "renormalised":
        raise UserError("weights renormalised with top_k 1 make every weight 1; use weights raw")
    if size is None and (key == "flatten" or delay):
        raise UserError("size None, the whole sequence, needs key mean and no delay")
    if size is not None and size < 1:
        raise UserError(f"size {size} of a segment is below 1")
    if delay not in DELAYS:
        raise UserError(f"delay {delay} is not one of {DELAYS}")
    if temperature <= 0 or not 0 <= dropout < 1:
        raise UserError(
            f"temperature {temperature} must be above 0, dropout {dropout} from 0 to below 1"
        )
    units = SegmentUnits(width, size, key, delay)
    weigh: Callable = WEIGHTS[weights]()
    drop = ScoreDropout(dropout)
    return PipelineRouter(
        num_experts,
        units=units,
        score=ScaledScore(units.key_width(width), num_experts, temperature),
        squash=softmax,
        terms=[drop] if dropout else [],
        select=TopK(top_k),
        weigh=DroppedWeights(drop, weigh) if dropout else weigh,
    )


_OPTIONS = {option.name: option for option in registry.find("segment", kind="router").options}

register_preset(
    segment_router,
    "chunk",
    kind="router",
    title="One choice for a chunk of tokens, by the mean of their hidden states",
    paper="Hydra, arXiv:2508.15099",
    needs=("training",),
    limits="Not causal unless delayed or of size 1; whole sequences only (no key-value cache).",
    settings={"key": "mean"},
    options=tuple(
        _OPTIONS[name] for name in ("size", "delay", "weights", "temperature", "dropout")
    ),
)
