"""A model without its weights: parameters on the meta device, buffers with their real values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from moekit.core.architecture import meta_model


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model of `config` in evaluation mode, its weights still to be put in.

    Parameters and the buffers that checkpoints hold are on the meta device; the other buffers are
    computed on `device`, as loading would. Raises UserError for a config that builds no model.
    """
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with _default_dtype(dtype):
        model = meta_model(config)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model.eval()


def weight_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The number format of every tensor of the state dict of a `skeleton` made for `dtype`.

    Some families keep single tensors in float32.
    """
    plan = model._get_dtype_plan(dtype)
    alternation, patterns, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = alternation.search(name) if alternation is not None else None
        found[name] = tensor.dtype
        if match is not None and match.lastgroup is not None and tensor.dtype.is_floating_point:
            found[name] = plan[patterns[match.lastgroup]]
    return found


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The number format that a config names, or None."""
    named = config.dtype
    return getattr(torch, named) if isinstance(named, str) else named


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
