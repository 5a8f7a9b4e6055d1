"""One optimiser step: forward and backward over the micro-batches of this process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.layers import RouterContext, Routing

from .balance import Balance, balance_loss, z_loss
from .model import RouterTap
from .recipe import TrainRecipe


@dataclass
class StepResult:
    """Sums over the step on this process: mean cross-entropy in nats a token, mean balance loss
    over layers, and `counts`, the pairs that each expert received, a tensor [E] for each of the
    `routings` of the last micro-batch."""

    loss: float
    balance: float
    counts: list[Tensor]
    routings: list[Routing]


def build_losses(
    model: nn.Module,
    tap: RouterTap,
    balance: Balance,
    recipe: TrainRecipe,
    compiled: bool = True,
) -> Callable[[Tensor, RouterContext], tuple[Tensor, Tensor, Tensor, list[Routing]]]:
    """The function from ids [B, S + 1] to (objective, cross-entropy, balance loss, routings).

    The balance loss is computed layer by layer and averaged: over all layers at once, an expert
    that starves in one layer is hidden by others in the rest. `compiled=False` overrules the
    recipe.
    """

    def losses(ids: Tensor, context: RouterContext):
        kind = ids.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = tap.forward(model, ids[:, :-1], context)
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        objective, uneven = nats, nats.new_zeros(())
        judged = [routing for routing in tap.records if routing.logits is not None]
        for routing in judged:
            uneven = uneven + balance_loss(routing) / len(judged)
            if balance.z_loss:
                objective = objective + balance.z_loss * z_loss(routing) / len(judged)
        if balance.coefficient:
            objective = objective + balance.coefficient * uneven
        return objective, nats.detach(), uneven.detach(), tap.records

    return torch.compile(losses) if recipe.compile and compiled else losses


def add_counts(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    """Counts by layer, summed; an empty `total` counts as zero."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else more


def run_step(
    losses: Callable, windows: Tensor, micro: int, step: int = 0, seed: int = 0, rank: int = 0
) -> StepResult:
    """Accumulate gradients over `windows` [B, S + 1], `micro` windows at a time.

    `step`, `seed` and the process's `rank` key what routers draw.
    """
    parts = windows.split(micro)
    total, uneven = 0.0, 0.0
    counts: list[Tensor] = []
    routings: list[Routing] = []
    for number, part in enumerate(parts):
        context = RouterContext(
            len(part), part.shape[1] - 1, step=step, seed=seed, part=rank * len(parts) + number
        )
        objective, nats, layer_uneven, routings = losses(part, context)
        (objective / len(parts)).backward()
        total += float(nats) / len(parts)
        uneven += float(layer_uneven) / len(parts)
        counts = add_counts(counts, [routing.counts() for routing in routings])
    return StepResult(total, uneven, counts, routings)
