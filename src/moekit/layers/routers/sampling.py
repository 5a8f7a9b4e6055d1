"""Choosing some experts by chance, in proportion to their scores, in training only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..context import RouterContext
from ..router import Choice
from ..select import dense_choice
from ..terms import NEVER


class SampledTopK:
    """The best `top_k` - `sampled` experts, and `sampled` drawn from the rest without replacement.

    Outside of training the best `top_k`. Each draw is in proportion to the scores, which must not
    be negative. ModuleFormer (arXiv 2306.04640) draws some, MoDE (arXiv 2412.12953) all.
    """

    def __init__(self, top_k: int, sampled: int) -> None:
        self.top_k, self.sampled = top_k, sampled

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        if not self.sampled or not context.training:
            return dense_choice(selection.topk(self.top_k, dim=-1).indices)
        best = selection.topk(self.top_k - self.sampled, dim=-1).indices
        uniform = torch.rand(
            selection.shape,
            generator=context.generator("sampled experts", selection.device),
            device=selection.device,
        )
        # The largest of log p + Gumbel noise are a draw without replacement from p.
        tiny = torch.finfo(uniform.dtype).tiny
        noise = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        drawn = selection.detach().clamp_min(tiny).log() + noise
        drawn = drawn.scatter(-1, best, NEVER).topk(self.sampled, dim=-1).indices
        return dense_choice(torch.cat([best, drawn], -1))
