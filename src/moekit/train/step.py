"""One optimiser step: forward and backward over the micro-batches of this process."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.layers import MoekitForCausalLM, RouterContext, Routing
from moekit.layers.balance.losses import balance_loss
from moekit.layers.routers.stochastic import consistency_loss

from .balance import BalanceRules
from .distill import Teacher
from .model import RouterTap
from .recipe import TrainRecipe


@dataclass
class StepResult:
    """Sums over the step on this process: mean cross-entropy in nats a token, mean balance loss
    over layers, and `counts`, the pairs that each expert received, a tensor [E] for each of the
    `routings` of the last micro-batch; `lost` are those that a capacity lost, a number each."""

    loss: float
    balance: float
    counts: list[Tensor]
    lost: list[Tensor]
    routings: list[Routing]


def build_losses(
    model: nn.Module,
    tap: RouterTap,
    balance: BalanceRules,
    recipe: TrainRecipe,
    compiled: bool = True,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, list[Routing]]]:
    """The function from ids [B, S + 1], context and progress of the run (0 to 1) to (objective,
    cross-entropy, balance loss, routings).

    The balance loss is the one that is reported: Switch's of this micro-batch, averaged over
    layers. `compiled=False` overrules the recipe. A `teacher` adds its loss. With consistency the
    objective holds the mean cross-entropy of two passes and half the weighted divergence; routings
    and what is reported are those of the first.
    """
    twice = recipe.consistency > 0

    def forward(ids: Tensor, context: RouterContext) -> tuple[Tensor, Tensor | None]:
        kind = ids.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = tap.forward(model, ids[:, :-1], context)
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        return nats, logits if teacher is not None or twice else None

    cross_entropy = torch.compile(forward) if recipe.compile and compiled else forward

    def losses(ids: Tensor, context: RouterContext, progress: float = 0.0):
        nats, logits = cross_entropy(ids, context)
        objective = nats
        if teacher is not None and logits is not None:
            objective = objective + teacher.loss(ids[:, :-1], logits, progress)
        records = tap.records
        if twice and logits is not None:
            objective = objective + second_pass(ids, context, nats, logits)
        scored = [r for r in records if r.logits is not None or r.scores is not None]
        judged = scored if balance.lenient else records
        layers = []
        if isinstance(model, MoekitForCausalLM):
            layers = [model.model.layers[routing.layer].mlp for routing in judged]
        for loss in balance.losses:
            objective = objective + loss(judged, context, layers, progress).to(nats.device)
        return objective, nats.detach(), _unevenness(scored, nats), records

    def second_pass(ids: Tensor, context: RouterContext, nats: Tensor, logits: Tensor) -> Tensor:
        """What a second pass adds to the first one's objective."""
        # No first pass has a negative part, so the draws of this one are its own.
        again, other = cross_entropy(ids, dataclasses.replace(context, part=-1 - context.part))
        assert other is not None
        divergence = consistency_loss(logits, other) / other[..., 0].numel()
        return (again - nats + recipe.consistency * divergence) / 2

    return losses


@torch.no_grad()
def _unevenness(records: list[Routing], like: Tensor) -> Tensor:
    """The mean balance loss of `records`; 0 where there are none."""
    values = [balance_loss(routing) for routing in records]
    return torch.stack(values).mean() if values else like.new_zeros(())


def add_counts(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    """Counts by layer, summed; an empty `total` counts as zero."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else more


def _lost(routing: Routing) -> Tensor:
    return torch.tensor(float(routing.num_dropped), device=routing.token.device)


def run_step(
    losses: Callable,
    windows: Tensor,
    micro: int,
    step: int = 0,
    seed: int = 0,
    rank: int = 0,
    progress: float = 0.0,
) -> StepResult:
    """Accumulate gradients over `windows` [B, S + 1], `micro` windows at a time.

    `step`, `seed` and the process's `rank` key what routers draw; `progress` is the fraction of the
    run that is done.
    """
    parts = windows.split(micro)
    total, uneven = 0.0, 0.0
    counts: list[Tensor] = []
    lost: list[Tensor] = []
    routings: list[Routing] = []
    for number, part in enumerate(parts):
        context = RouterContext(
            len(part), part.shape[1] - 1, step=step, seed=seed, part=rank * len(parts) + number
        )
        objective, nats, layer_uneven, routings = losses(part, context, progress)
        (objective / len(parts)).backward()
        total += float(nats) / len(parts)
        uneven += float(layer_uneven) / len(parts)
        counts = add_counts(counts, [routing.counts() for routing in routings])
        lost = add_counts(lost, [_lost(routing) for routing in routings])
    return StepResult(total, uneven, counts, lost, routings)
