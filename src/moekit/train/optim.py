"""Which optimiser each parameter gets, and the learning rate over the run."""

from typing import Any

import torch
from torch import nn

from .muon import Muon
from .recipe import OptimRecipe


def build_optimizers(
    model: Any, recipe: OptimRecipe, routers: set[str], fused_gate_up: set[str]
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden weight matrices and AdamW for everything else.

    `routers` names the router parameters and `fused_gate_up` the banks that hold gate and up one
    above the other. Embeddings, heads, routers, norms and biases never go to Muon. Weight decay
    touches matrices only.
    """
    input_embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    matrices: dict[int, list[nn.Parameter]] = {}
    embeddings, decayed, plain = [], [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param is input_embedding:
            embeddings.append(param)
        elif param.ndim < 2:
            plain.append(param)
        elif recipe.name == "muon" and name not in routers and head is not None:
            if param is head.weight:
                decayed.append(param)
            else:
                matrices.setdefault(2 if name in fused_gate_up else 1, []).append(param)
        else:
            decayed.append(param)
    groups = [
        {"params": embeddings, "lr": recipe.embedding_lr, "weight_decay": 0.0},
        {"params": decayed, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-10,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adam]
    if matrices:
        split_groups = [{"params": params, "split": split} for split, params in matrices.items()]
        optimizers.append(Muon(split_groups, lr=recipe.muon_lr, weight_decay=recipe.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, steps: int, recipe: OptimRecipe) -> float:
    """The fraction of the peak learning rate at `step` of `steps`: rise, plateau, linear fall.

    Before the fall begins it does not depend on `steps`, so a plateau can be extended or cut short
    by resuming with another number of tokens.
    """
    rise = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    fall_steps = recipe.decay * steps
    remaining = steps - step
    if fall_steps and remaining < fall_steps:
        return rise * (recipe.final_lr + (1 - recipe.final_lr) * remaining / fall_steps)
    return rise


def set_rate(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """Set every group's learning rate to `fraction` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
