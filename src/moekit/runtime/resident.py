"""The resident part of a packed model: put into the model, the experts left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.find import MoESite, find_moe
from moekit.core.layer_spec import expert_tensors
from moekit.core.skeleton import config_dtype, skeleton, weight_dtypes
from moekit.runtime.store import ExpertStore, StoreError


def resident_model(
    store: ExpertStore,
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model of `config` with the resident part of `store`; its experts stay on meta.

    `dtype` None is the config's number format, else the stored one. Each tensor is read, converted
    and put in its place on `device` (default: the processor's memory) before the next one. Raises
    StoreError for a damaged or incomplete part.
    """
    model = skeleton(config, dtype or config_dtype(config) or _stored_dtype(store))
    formats = weight_dtypes(model, model.dtype)
    places = _places(model)
    expected = model.state_dict(keep_vars=True)
    for name, tensor in store.resident():
        slot = expected.get(name)
        if slot is None or slot.shape != tensor.shape:
            raise StoreError(
                f"{store.path}: tensor {name} {list(tensor.shape)} has no place in the model of "
                "its config.json. Convert the model again."
            )
        value = tensor.to(formats[name]).to(device)
        if isinstance(slot, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for held, leaf in places[id(slot)]:
            held[leaf] = value
    _check_complete(store, model)
    if device is not None:
        move(model, device)
    return model


def _stored_dtype(store: ExpertStore) -> torch.dtype:
    return next((t.dtype for _, t in store.resident() if t.is_floating_point()), torch.float32)


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Which dictionaries of modules hold each tensor of the model; a tied one is in several."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for leaf, tensor in held.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((held, leaf))
    return found


def move(model: PreTrainedModel, device: torch.device) -> None:
    """Move all of a model to `device` but its experts, which stay on meta; also what no file holds,
    such as the frequencies of rotary embeddings. Tied tensors stay tied."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for leaf, tensor in held.items():
                if tensor is None or tensor.is_meta or tensor.device == device:
                    continue
                if id(tensor) not in moved:
                    value = tensor.to(device)
                    wraps = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(value, False) if wraps else value
                held[leaf] = moved[id(tensor)]


def _check_complete(store: ExpertStore, model: PreTrainedModel) -> None:
    experts = {id(p) for site in find_moe(model) for p in expert_parameters(site).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta and id(tensor) not in experts:
            raise StoreError(f"{store.path}: tensor {name} is missing. Convert the model again.")


def expert_parameters(site: MoESite) -> dict[str, nn.Parameter]:
    """The parameters that hold the routed experts of a layer, by name below its experts module."""
    prefixes = expert_tensors(site)
    return {n: p for n, p in site.experts.named_parameters() if n.startswith(prefixes)}
