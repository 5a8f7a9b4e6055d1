"""Saving and restoring a training run, bit for bit, without pickling anything.

A checkpoint is a folder with the weights, the optimisers' state (both safetensors) and the step.
It is written beside the old one and swapped in, so that a crash leaves one that is whole.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.core.errors import UserError

from .shard import cut_like, whole

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state, named `<kind>|<parameter>`, whole and on the CPU."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for kind, value in state.items():
                tensors[f"{kind}|{names[param]}"] = whole(torch.as_tensor(value).detach()).cpu()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    params = dict(model.named_parameters())
    owner = {
        param: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    }
    for key, value in tensors.items():
        kind, _, name = key.partition("|")
        param = params[name]
        # AdamW keeps its step count on the CPU unless fused on a GPU; follow what it expects.
        moved = value.to(param.device, copy=True)
        target = value.clone() if kind == "step" else cut_like(moved, param)
        owner[param].state[param][kind] = target


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with tied tensors once, whole, contiguous and on the CPU."""
    seen: set[tuple[int, torch.Size]] = set()
    tensors = {}
    for name, value in model.state_dict().items():
        own = value.to_local() if isinstance(value, DTensor) else value
        # A slice may be empty here and nowhere else, so its place alone says nothing.
        key = (own.data_ptr() or id(value), value.shape)
        if key not in seen:
            seen.add(key)
            tensors[name] = whole(value.detach()).cpu().contiguous()
    return tensors


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    write: bool = True,
) -> None:
    """Write a checkpoint to `folder`, replacing the one that is there only when complete.

    Without `write` this process only gives its slices of a sharded model.
    """
    from safetensors.torch import save_file

    weights, moments = unique_state(model), optimizer_tensors(model, optimizers)
    if not write:
        return
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(weights, fresh / WEIGHTS)
    save_file(moments, fresh / OPTIMIZER)
    (fresh / STATE).write_text(json.dumps(state))
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint at `folder`, also after a crash in the middle of a swap."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / STATE).is_file():
            return candidate
    return None


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict:
    """Restore `model` and `optimizers` from `folder`; returns the state saved with them."""
    from safetensors.torch import load_file

    try:
        now = model.state_dict()
        saved = load_file(folder / WEIGHTS)
        model.load_state_dict({n: cut_like(v, now[n]) for n, v in saved.items()}, strict=False)
        load_optimizer_tensors(model, optimizers, load_file(folder / OPTIMIZER))
        return json.loads((folder / STATE).read_text())
    except Exception as error:
        raise UserError(
            f"the checkpoint in {folder} cannot be read ({error}); delete the unfinished run to "
            "start over."
        ) from error
