"""Sub-models of fewer experts, drawn while training (ElasticMoE of ERNIE 5.0, arXiv:2602.04705)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core import seeds
from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..router import Choice, PartList
from ..score import LinearScore
from ..select import dense_choice
from ..terms import NEVER, ExpertBias
from .pipeline import pipeline_router


@dataclass(frozen=True)
class Elasticity:
    """The sub-models of a model of `num_experts` experts, `top_k` of them a token.

    A sub-model keeps the first experts of each layer, one of the numbers `experts`, of which a
    token uses one of the numbers `top_ks`. In a step of training the full model runs with
    probability `full`; otherwise each number is drawn by itself. All layers share the draw, so
    that it can be cut out of the model. Outside of training the numbers are `eval_experts` and
    `eval_top_k`.
    """

    num_experts: int
    top_k: int
    experts: tuple[int, ...]
    top_ks: tuple[int, ...]
    full: float
    eval_experts: int
    eval_top_k: int

    def draw(self, context: RouterContext) -> tuple[int, int]:
        """Experts kept and experts a token, in this step."""
        if not context.training:
            return self.eval_experts, self.eval_top_k
        is_full, first, second, _ = sub_model_draw(context)
        if is_full < self.full:
            return self.num_experts, self.top_k
        kept = self.experts[int(first * len(self.experts))]
        return kept, min(kept, self.top_ks[int(second * len(self.top_ks))])


def sub_model_draw(context: RouterContext) -> list[float]:
    """Four uniform numbers of this step, the same in every layer.

    They decide whether the full model runs, and its experts, experts a token and layers otherwise.
    """
    generator = seeds.generator(context.seed, f"sub-model of step {context.step}")
    return torch.rand(4, generator=generator).tolist()


class ElasticScore(nn.Module):
    """Linear logits, minus infinity for the experts that the sub-model does not keep."""

    def __init__(self, width: int, num_experts: int, elasticity: Elasticity) -> None:
        super().__init__()
        self.linear = LinearScore(width, num_experts)
        self.elasticity = elasticity

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        logits = self.linear(key, context)
        kept, _ = self.elasticity.draw(context)
        dropped = torch.arange(logits.shape[1], device=logits.device) >= kept
        return logits.masked_fill(dropped, NEVER)


class ElasticTopK:
    """The best experts of every unit, as many as the sub-model uses."""

    def __init__(self, elasticity: Elasticity) -> None:
        self.elasticity = elasticity

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        kept, top_k = self.elasticity.draw(context)
        # Of the kept ones only: a bias may lift a dropped expert's score of 0 above theirs.
        return dense_choice(selection[:, :kept].topk(top_k, dim=-1).indices)


class ElasticBias(ExpertBias):
    """The loss-free bias, of which a step moves only the experts that its sub-model kept."""

    def __init__(self, elasticity: Elasticity, rate: float) -> None:
        super().__init__(elasticity.num_experts, rate)
        self.elasticity = elasticity
        self.kept = elasticity.num_experts

    def forward(self, selection: Tensor, scores: Tensor, context: RouterContext) -> Tensor:
        if context.training:
            self.kept, _ = self.elasticity.draw(context)
        return super().forward(selection, scores, context)

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        """Move the bias by `counts` [E]; an expert that could not be chosen counts as balanced."""
        counts = counts.float().clone()
        counts[self.kept :] = counts[: self.kept].mean()
        super().after_step(counts)


@register(
    "router",
    "elastic",
    title="Sub-models of fewer experts and a smaller top-k are drawn in training",
    paper="ERNIE 5.0, arXiv:2602.04705",
    needs=("training",),
    limits="The report does not say how sub-models are drawn: uniformly here, the first experts.",
    options={
        "experts": "numbers of experts that sub-models keep; None: half and all",
        "top_ks": "experts a token in sub-models; None: a quarter, half and all of top_k",
        "full": "probability that a step trains the full model",
        "eval_experts": "experts kept outside of training; None: all",
        "eval_top_k": "experts a token outside of training; None: top_k",
        "weights": "weights of the chosen experts: raw or renormalised",
        "bias_rate": "step of the loss-free bias; 0: no bias",
    },
)
def elastic_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    experts: list[int] | None = None,
    top_ks: list[int] | None = None,
    full: float = 0.5,
    eval_experts: int | None = None,
    eval_top_k: int | None = None,
    weights: str = "raw",
    bias_rate: float = 1e-3,
) -> nn.Module:
    """Top-k of a softmax over the experts of the step's sub-model, with a loss-free bias.

    Raises UserError for numbers beyond those of the full model.
    """
    elasticity = Elasticity(
        num_experts,
        top_k,
        tuple(experts or sorted({max(top_k, num_experts // 2), num_experts})),
        tuple(top_ks or sorted({max(1, top_k // 4), max(1, top_k // 2), top_k})),
        full,
        num_experts if eval_experts is None else eval_experts,
        top_k if eval_top_k is None else eval_top_k,
    )
    kept, used = elasticity.eval_experts, elasticity.eval_top_k
    for what, numbers, most in (
        ("experts", (*elasticity.experts, kept), num_experts),
        ("top_ks", (*elasticity.top_ks, used), top_k),
    ):
        if not all(1 <= number <= most for number in numbers):
            raise UserError(
                f"{what} {list(numbers)} must lie between 1 and the full model's {most}"
            )
    if used > kept:
        raise UserError(f"eval_top_k {used} exceeds eval_experts {kept}")
    if not 0 <= full <= 1:
        raise UserError(f"full {full} is not a probability")
    router: Any = pipeline_router(width, num_experts, top_k, weights=weights)
    router.score = ElasticScore(width, num_experts, elasticity)
    router.select = ElasticTopK(elasticity)
    if bias_rate:
        router.terms = PartList([ElasticBias(elasticity, bias_rate)])
    return router
