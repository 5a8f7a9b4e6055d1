"""Saving and restoring a training run, bit for bit, without pickling anything.

A checkpoint is a folder with the weights, the optimisers' state (both safetensors) and the step.
It is written beside the old one and swapped in, so that a crash leaves one that is whole.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state, named `<kind>|<parameter>`."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for kind, value in state.items():
                tensors[f"{kind}|{names[param]}"] = torch.as_tensor(value).detach()
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
        target = value.clone() if kind == "step" else value.to(param.device, copy=True)
        owner[param].state[param][kind] = target


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with tied tensors once, contiguous and on the CPU."""
    seen: set[tuple[int, torch.Size]] = set()
    tensors = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape)
        if key not in seen:
            seen.add(key)
            tensors[name] = value.detach().cpu().contiguous()
    return tensors


def save_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict
) -> None:
    """Write a checkpoint to `folder`, replacing the one that is there only when complete."""
    from safetensors.torch import save_file

    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(unique_state(model), fresh / WEIGHTS)
    save_file(
        {key: value.cpu() for key, value in optimizer_tensors(model, optimizers).items()},
        fresh / OPTIMIZER,
    )
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
        model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        load_optimizer_tensors(model, optimizers, load_file(folder / OPTIMIZER))
        return json.loads((folder / STATE).read_text())
    except Exception as error:
        raise UserError(
            f"the checkpoint in {folder} cannot be read ({error}); delete the unfinished run to "
            "start over."
        ) from error
