"""Slimming: every expert loses neurons of low sensitivity, in stages, and the model learns between.

Shapes: E experts, F expert width, D width. A removed neuron keeps its place with a down column of
zeros while the model learns, so its function is that of the narrower expert; the plan at the end
takes it out. (SlimMoE 2506.18349.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.compress.slim.distillation import (
    TOP,
    logits_of,
    teach,
    truncated_cross_entropy,
    truncated_divergence,
)
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.core.neurons import PARTS
from moekit.core.plan import ExpertPlan, Fingerprint
from moekit.core.plan_tensors import PlanTensors
from moekit.core.registry import register
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.profile.experts_run import runs_choices


@dataclass
class Slimmed:
    """What was done: the plan that cuts the model as it now is, and the losses of every stage."""

    plan: ExpertPlan
    widths: list[int]
    losses: list[list[float]]


def stage_widths(width: int, target: int, stages: int) -> list[int]:
    """Widths from below `width` down to `target`, each stage by the same factor.

    Raises UserError for a target outside of 1 to `width`, or no stage.
    """
    if not 1 <= target <= width:
        raise UserError(f"--width {target} is outside of 1 to {width}, the experts' width")
    if stages < 1:
        raise UserError(f"--stages {stages} must be at least 1")
    factor = (target / width) ** (1 / stages)
    return [round(width * factor**stage) for stage in range(1, stages)] + [target]


def sensitivity(view: MoEView, batches: Sequence[Batch], teacher: Any) -> list[Tensor]:
    """|sum over a neuron's weights of weight * gradient| of the distillation loss, [E, F] by layer.

    By neuron and batch, averaged over batches. Raises UserError for families whose experts are no
    bank of their own.
    """
    model: Any = view.model
    total = [torch.zeros(layer.num_experts, _width(layer)) for layer in view]
    with _gradients(model):
        for batch in batches:
            ids, probabilities = teach(teacher, batch)
            model.zero_grad(set_to_none=True)
            truncated_cross_entropy(logits_of(model, batch), ids, probabilities).mean().backward()
            for layer, sums in zip(view, total, strict=True):
                for e in range(layer.num_experts):
                    sums[e] += _product(layer, e).abs().cpu() / len(batches)
    model.zero_grad(set_to_none=True)
    return total


@register(
    "slimmer",
    "slim",
    title="Narrower experts in stages: neurons by sensitivity, distillation from the original",
    paper="SlimMoE 2506.18349",
    needs=("weights", "data", "gradients", "training"),
    limits="Experts only, no attention heads. Two models and the optimiser's state are in memory.",
    options={
        "stages": "prunings, each followed by training",
        "steps": "training steps of a stage; 0 prunes alone",
        "learning_rate": "of AdamW, falling to 0 by a cosine in every stage",
        "score_batches": "batches that the sensitivities are taken on",
    },
)
def slim(
    view: MoEView,
    batches: Sequence[Batch],
    target: int,
    *,
    stages: int = 2,
    steps: int = 100,
    learning_rate: float = 1e-4,
    score_batches: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Slimmed:
    """Slim the loaded model of `view` in place to experts of `target` neurons.

    Every stage keeps the most sensitive neurons of each expert, then trains all weights, router
    included, towards the most likely tokens of the original model. Without a neuron to remove the
    model is left as it is. Raises UserError as `sensitivity` and `stage_widths` do, and for no
    text.
    """
    if not len(batches):
        raise UserError("there is no text to slim on: 0 sequences.")
    for layer in view:
        if runs_choices(layer):
            raise UserError(
                f"{layer.name}: {type(layer).__name__} runs its experts by code of its own."
            )
    model: Any = view.model
    width = min(_width(layer) for layer in view)
    widths = stage_widths(width, target, stages)
    kept = [torch.ones(layer.num_experts, _width(layer), dtype=torch.bool) for layer in view]
    losses: list[list[float]] = []
    if target < width:
        teacher = copy.deepcopy(model).requires_grad_(False)
        for stage, size in enumerate(widths):
            scores = sensitivity(view, batches[:score_batches], teacher)
            kept = [_best(s, k, size) for s, k in zip(scores, kept, strict=True)]
            _clear(view, kept)

            def done(step: int, stage: int = stage) -> None:
                if progress is not None:
                    progress(stage * steps + step, stages * steps)

            losses.append(_train(view, kept, teacher, batches, steps, learning_rate, done))
    return Slimmed(_plan(view, kept), widths, losses)


def _train(
    view: MoEView,
    kept: Sequence[Tensor],
    teacher: Any,
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    done: Callable[[int], None],
) -> list[float]:
    model: Any = view.model
    losses: list[float] = []
    if not steps:
        return losses
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with _gradients(model):
        for step in range(steps):
            batch = batches[step % len(batches)]
            ids, probabilities = teach(teacher, batch, TOP)
            loss = truncated_divergence(logits_of(model, batch), ids, probabilities).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            # The gradient of a column of zeros is none of zero: it would come back.
            _clear(view, kept)
            losses.append(loss.item())
            done(step + 1)
    return losses


def _best(scores: Tensor, kept: Tensor, size: int) -> Tensor:
    """The `size` kept neurons of highest score of every expert, [E, F]."""
    order = scores.masked_fill(~kept, -1).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(kept).scatter(1, order[:, :size], True)


@torch.no_grad()
def _clear(view: MoEView, kept: Sequence[Tensor]) -> None:
    for layer, mask in zip(view, kept, strict=True):
        for e in range(layer.num_experts):
            layer.expert_views(e).down[:, ~mask[e]] = 0


def _plan(view: MoEView, kept: Sequence[Tensor]) -> ExpertPlan:
    neurons = {
        (layer.index, e): mask[e].nonzero().flatten()
        for layer, mask in zip(view, kept, strict=True)
        for e in range(layer.num_experts)
        if not bool(mask[e].all())
    }
    model: Any = view.model
    fingerprint = Fingerprint.of(spec_of(model))
    return ExpertPlan({}, fingerprint, "slim", tensors=PlanTensors(neurons=neurons))


def _product(layer: MoELayer, e: int) -> Tensor:
    """Sum over every neuron's weights of weight * gradient, [F]."""
    weights = layer.expert_views(e).tensors()
    gradients = _gradient_views(layer, e).tensors()
    total = torch.zeros(_width(layer), device=weights["down"].device)
    for name in PARTS:
        if name in weights:
            product = weights[name].float() * gradients[name].float()
            total += product if product.ndim == 1 else product.sum(0 if name == "down" else 1)
    return total


def _gradient_views(layer: MoELayer, e: int) -> ExpertWeights:
    """The gradients of an expert's parts, by swapping them in for the bank's data."""
    experts: Any = layer.experts
    held = dict(experts.named_parameters(recurse=False))
    swapped = copy.copy(experts)
    swapped._parameters = {
        name: nn.Parameter(torch.zeros_like(p) if p.grad is None else p.grad, requires_grad=False)
        for name, p in held.items()
    }
    twin = copy.copy(layer)
    twin.experts = swapped
    return twin.expert_views(e)


def _width(layer: MoELayer) -> int:
    return layer.expert_views(0).down.shape[1]


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Gradients of all weights, without dropout."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval()
        model.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
