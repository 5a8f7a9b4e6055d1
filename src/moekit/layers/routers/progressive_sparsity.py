"""Low layers start with more experts a token than they end with (Sigma-MoE, arXiv:2512.16248)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..router import Choice
from ..select import dense_choice
from .pipeline import pipeline_router


class ScheduledTopK(nn.Module):
    """The best experts of every unit: `early[layer]` of them before step `until`, then `top_k`.

    Layers beyond the list have `top_k` from the start. Outside of training the number is that of
    the last step trained, which is saved with the model.
    """

    last_step: Tensor

    def __init__(self, top_k: int, early: list[int], until: int) -> None:
        super().__init__()
        self.top_k, self.early, self.until = top_k, early, until
        self.register_buffer("last_step", torch.tensor(0))

    def forward(self, selection: Tensor, context: RouterContext) -> Choice:
        if context.training:
            self.last_step.fill_(context.step)
        step = context.step if context.training else int(self.last_step)
        top_k = self.top_k
        if step < self.until and context.layer < len(self.early):
            top_k = self.early[context.layer]
        return dense_choice(selection.topk(top_k, dim=-1).indices)


@register(
    "router",
    "progressive-sparsity",
    title="Low layers use more experts a token until late in training",
    paper="Sigma-MoE-Tiny, arXiv:2512.16248",
    needs=("training",),
    limits="The numbers of early experts are recalled from the report, not confirmed.",
    options={
        "until": "step at which every layer goes to top_k; the report: 0.9 of training",
        "early": "experts a token before that, one number for each of the lowest layers",
        "weights": "weights of the chosen experts: raw or renormalised",
        "bias_rate": "step of the loss-free bias; 0: no bias",
    },
)
def progressive_sparsity_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    until: int,
    early: list[int] | None = None,
    weights: str = "raw",
    bias_rate: float = 0.0,
) -> nn.Module:
    """Top-k of a softmax with `ScheduledTopK`; `early` is [8, 8, 6, 6, 4, 4, 2, 2] by default.

    No parameter depends on the schedule, so weights and optimiser go on as they are at the switch.
    """
    if early is None:
        early = [min(many, num_experts) for many in (8, 8, 6, 6, 4, 4, 2, 2)]
    for layer, many in enumerate(early):
        if not isinstance(many, int) or not top_k <= many <= num_experts:
            raise UserError(
                f"early: {many} of layer {layer} is not between top_k {top_k} and the "
                f"{num_experts} experts"
            )
    router = pipeline_router(width, num_experts, top_k, weights=weights, bias_rate=bias_rate)
    router.select = ScheduledTopK(top_k, early, until)
    return router
