"""A small share of training steps routes by optimal transport (SSR, arXiv:2511.08972).

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.ops.sinkhorn import sinkhorn

from ..context import RouterContext
from ..names import one_of
from ..router import PipelineRouter
from ..score import LinearScore
from ..select import TopK
from ..squash import softmax
from ..weigh import RenormalisedWeights

# Of the columns' sums, relative.
TOLERANCE = 1e-5
TRANSPORTED = ("softmax", "logits")


class TransportScore(nn.Module):
    """Linear logits; in a transport step those whose softmax is the transport plan.

    The plan is a bias per expert added to the scores, which unlike a loss-free bias enters the
    weights; padding has no part in its balance. A step of training is a transport step with
    `probability`, drawn for every step and layer; outside of training none is. A transport step
    trains the experts; the router too if `differentiable`, with the bias held fixed.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        probability: float,
        smoothing: float,
        transported: str,
        noise: float,
        differentiable: bool,
    ) -> None:
        super().__init__()
        self.linear = LinearScore(width, num_experts)
        self.probability, self.smoothing, self.noise = probability, smoothing, noise
        self.transported, self.differentiable = transported, differentiable

    @property
    def causal(self) -> bool:
        """False while transport steps are possible: their plan depends on the whole batch."""
        return not (self.training and self.probability)

    @property
    def sees_batch(self) -> bool:
        return not self.causal

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        logits = self.linear(key, context)
        if not context.training:
            return logits
        if self.noise:
            device = logits.device
            draw = torch.randn(
                logits.shape, generator=context.generator("noise", device), device=device
            )
            logits = logits + self.noise * draw
        if not self._is_transport_step(context):
            return logits
        scores = logits.softmax(-1) if self.transported == "softmax" else logits
        real = scores if context.token_mask is None else scores[context.token_mask]
        plan = sinkhorn(real.detach(), self.smoothing, iterations=100, tolerance=TOLERANCE)
        planned = scores / self.smoothing + plan.columns
        if self.differentiable:
            return planned
        # A gradient of zero and not none: data parallel training waits for one.
        return planned.detach() + 0 * logits

    def _is_transport_step(self, context: RouterContext) -> bool:
        draw = torch.rand((), generator=context.step_generator("transport step"))
        return bool(draw < self.probability)


@register(
    "router",
    "ssr",
    title="Top-k of a softmax; a small share of training steps routes by optimal transport",
    paper="SSR, arXiv:2511.08972",
    needs=("training",),
    limits="No balance loss is meant beside it. Transport steps are not causal; inference is.",
    options={
        "probability": "share of training steps that route by transport",
        "smoothing": "weight of the plan's entropy; larger is flatter",
        "transported": f"what the plan maximises: {' or '.join(TRANSPORTED)}",
        "noise": "in training, gaussian noise on the logits",
        "differentiable": "let transport steps train the router too",
    },
)
def selective_sinkhorn_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    probability: float = 0.01,
    smoothing: float = 0.5,
    transported: str = "softmax",
    noise: float = 0.0,
    differentiable: bool = False,
) -> nn.Module:
    """Top-k of a softmax or of a transport plan, weights renormalised over the chosen."""
    one_of("transported", transported, TRANSPORTED)
    if not 0 <= probability <= 1:
        raise UserError(f"probability {probability} is not between 0 and 1")
    if smoothing <= 0:
        raise UserError(f"smoothing {smoothing} is not above 0")
    return PipelineRouter(
        num_experts,
        score=TransportScore(
            width,
            num_experts,
            probability=probability,
            smoothing=smoothing,
            transported=transported,
            noise=noise,
            differentiable=differentiable,
        ),
        squash=softmax,
        select=TopK(top_k),
        weigh=RenormalisedWeights(),
    )
