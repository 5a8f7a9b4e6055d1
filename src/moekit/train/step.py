"""One optimiser step: forward and backward over the micro-batches of this process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import Balance, balance_loss, expert_counts, z_loss
from .model import RouterTap
from .recipe import TrainRecipe


@dataclass
class StepResult:
    """Sums over the step on this process: mean cross-entropy in nats a token, mean balance loss
    over layers, and `counts`, the pairs that each expert received, a tensor [E] a layer."""

    loss: float
    balance: float
    counts: list[Tensor]


def build_losses(
    model: nn.Module,
    tap: RouterTap,
    balance: Balance,
    recipe: TrainRecipe,
    compiled: bool = True,
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """The function from ids [B, S + 1] to (objective, cross-entropy, balance loss, counts).

    The balance loss is computed layer by layer and averaged: over all layers at once, an expert
    that starves in one layer is hidden by others in the rest. `compiled=False` overrules the
    recipe.
    """

    def losses(ids: Tensor):
        tap.reset()
        kind = ids.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        objective, uneven = nats, nats.new_zeros(())
        for layer_logits, layer_ids in zip(tap.logits, tap.ids, strict=True):
            uneven = uneven + balance_loss(layer_logits, layer_ids) / len(tap.logits)
            if balance.z_loss:
                objective = objective + balance.z_loss * z_loss(layer_logits) / len(tap.logits)
        if balance.coefficient:
            objective = objective + balance.coefficient * uneven
        counts = [
            expert_counts(ids_, number)
            for ids_, number in zip(tap.ids, tap.num_experts, strict=True)
        ]
        return objective, nats.detach(), uneven.detach(), counts

    return torch.compile(losses) if recipe.compile and compiled else losses


def add_counts(total: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    """Counts by layer, summed; an empty `total` counts as zero."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else more


def run_step(losses: Callable, windows: Tensor, micro: int) -> StepResult:
    """Accumulate gradients over `windows` [B, S + 1], `micro` windows at a time."""
    parts = windows.split(micro)
    total, uneven = 0.0, 0.0
    counts: list[Tensor] = []
    for part in parts:
        objective, nats, layer_uneven, layer_counts = losses(part)
        (objective / len(parts)).backward()
        total += float(nats) / len(parts)
        uneven += float(layer_uneven) / len(parts)
        counts = add_counts(counts, layer_counts)
    return StepResult(total, uneven, counts)
