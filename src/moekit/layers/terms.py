"""Terms that act on the choice alone: parts `(selection [U, E], scores, context) -> selection`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .balance.bias import move_bias
from .context import RouterContext

NEVER = float("-inf")


class ExpertBias(nn.Module):
    """A bias [E] that is added for the choice only and moved after every step, without a gradient.

    Loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437. `rule` and `limit` are
    those of `balance.move_bias`. The load of a batch never touches its own routing, so the choice
    stays causal.
    """

    expert_bias: Tensor
    bias_updates: Tensor

    def __init__(
        self, num_experts: int, rate: float, *, rule: str = "sign", limit: float | None = None
    ) -> None:
        super().__init__()
        self.rate, self.rule, self.limit = rate, rule, limit
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        # Only steps that shrink depend on how many there were, so only they are saved with it.
        self.shrinks = rule.endswith(("-sqrt", "-inverse"))
        if self.shrinks:
            self.register_buffer("bias_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        return selection + self.expert_bias

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        number = 1
        if self.shrinks:
            self.bias_updates += 1
            number = int(self.bias_updates)
        move_bias(
            self.expert_bias, counts, self.rate, rule=self.rule, number=number, limit=self.limit
        )


class GroupLimit:
    """Only experts of the best `keep` of `groups` equal groups may be chosen.

    A group is as good as its best expert (`by` "max", DeepSeek-V2, arXiv 2405.04434) or its best
    two together ("top2", DeepSeek-V3, arXiv 2412.19437).
    """

    def __init__(self, groups: int, keep: int, by: str) -> None:
        self.groups, self.keep, self.best = groups, keep, {"max": 1, "top2": 2}[by]

    def __call__(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        grouped = selection.unflatten(-1, (self.groups, -1))
        best = grouped.topk(min(self.best, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = best.topk(self.keep, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
        # Minus infinity and not 0: a biased score may be negative.
        return grouped.masked_fill(~allowed.unsqueeze(-1), NEVER).flatten(-2)


class Noise:
    """Gaussian noise of `scale` on the choice, in training only."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        if not context.training:
            return selection
        draw = torch.randn(
            selection.shape,
            generator=context.generator("noise", selection.device),
            device=selection.device,
        )
        return selection + self.scale * draw
