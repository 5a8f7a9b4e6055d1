"""Parameters, gradients and optimiser state in slices, one a process (FSDP2).

Every layer is put together when it is needed and cut again after. What leaves the training loop
(a checkpoint, an evaluation, the result) is put together whole, on the main process.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moekit.core.errors import UserError

from .distributed import World
from .model import build_model

if TYPE_CHECKING:
    from .run import Run


def shard(model: Any, world: World) -> None:
    """Cut the parameters of `model` over all processes, layer by layer, in place.

    Raises UserError where layers share a pool of experts, which no single layer could put together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any("_lent" in module.__dict__ for module in model.modules()):
        raise UserError("train.shard does not go with moe.share_pool; leave one of them out.")
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut the model."""
    return any(isinstance(param, DTensor) for param in model.parameters())


def whole(value: Tensor) -> Tensor:
    """`value` put together; every process must ask for a slice's whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, pattern: Tensor) -> Tensor:
    """`value` cut over processes as `pattern` is."""
    if isinstance(pattern, DTensor):
        return distribute_tensor(value, pattern.device_mesh, pattern.placements)
    return value


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, put together and on the CPU; every process must ask for it."""
    return {name: whole(value.detach()).cpu() for name, value in model.state_dict().items()}


def put_together(run: "Run") -> "Run":
    """`run` with a model that computes on one process: itself unless it is sharded.

    Every process must ask for it, and only the main one may use it.
    """
    if not is_sharded(run.model):
        return run
    state = whole_state(run.model)
    if not run.world.is_main:
        return run
    model = build_model(run.recipe, len(run.tokenizer), run.tokenizer.eos_token_id)
    model.load_state_dict(state)
    return replace(run, model=model.to(run.world.device))


def gradient_norm(params: Iterable[nn.Parameter], limit: float) -> float:
    """Clip the gradients of `params` to norm `limit`; returns the norm before."""
    return float(whole(torch.nn.utils.clip_grad_norm_(params, limit)))
