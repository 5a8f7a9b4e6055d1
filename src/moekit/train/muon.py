"""Muon, the optimiser that orthogonalises the momentum of weight matrices, for banks of experts.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Torch ships a Muon
for 2-D parameters only; an expert bank is a stack of matrices, and a fused gate-and-up bank is two
stacks, each of which must be orthogonalised by itself.
"""

import torch
from torch import Tensor

# Coefficients of the quintic iteration, chosen by its authors for the steepest slope at zero.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to `matrices` [..., m, n], approximately.

    Singular values end between about 0.7 and 1.2. Runs in bf16.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay over parameters [m, n] or [E, m, n].

    A parameter group may set `split` to the number of matrices stacked along m (2 for a fused gate
    and up). `lr` is the update's root mean square relative to a matrix with orthonormal rows,
    scaled by sqrt(max(1, m / n)).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"]
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                rows, columns = param.shape[-2] // group["split"], param.shape[-1]
                stacked = update.view(*param.shape[:-2], group["split"], rows, columns)
                update = orthogonalize(stacked).view(param.shape).to(param.dtype)
                scale = max(1.0, rows / columns) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)
        return loss
