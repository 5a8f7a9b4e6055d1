"""A packed model as transformers loads an unpacked one: every expert decoded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moekit.core.architecture import read_config
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.core.load import LoadedModel, load_tokenizer
from moekit.core.machine import available_memory
from moekit.core.memory import format_bytes
from moekit.core.new_experts import pad_width, width_of
from moekit.core.spec import MoESpec
from moekit.core.view import MoEView
from moekit.runtime.resident import expert_parameters, resident_model
from moekit.runtime.store import ExpertStore
from moekit.runtime.torch_experts import decoded


def load_packed(directory: Path, dtype: str | None = None) -> LoadedModel:
    """The model that the packed one in `directory` stands for, in memory, as `moekit.load` gives.

    Its experts have the values that their codec left them, in `dtype` (default: as the config
    says). Raises UserError where they do not fit into memory and StoreError for damage.
    """
    config = read_config(directory)
    with ExpertStore.open(directory) as store:
        model = resident_model(store, config, None if dtype is None else getattr(torch, dtype))
        view = MoEView(model)
        places = [
            (site.experts, name, parameter)
            for site in find_moe(model)
            for name, parameter in expert_parameters(site).items()
        ]
        needed = sum(parameter.nbytes for _, _, parameter in places)
        if needed > available_memory():
            raise UserError(
                f"{directory}: its experts take {format_bytes(needed)} when decoded, and "
                f"{format_bytes(available_memory())} are left; `moekit run` runs it packed"
            )
        for experts, name, parameter in places:
            owner, _, leaf = name.rpartition(".")
            values = torch.zeros(parameter.shape, dtype=parameter.dtype)
            held = experts.get_submodule(owner)._parameters
            held[leaf] = nn.Parameter(values, requires_grad=False)
        for position, layer in enumerate(view):
            for expert in range(layer.num_experts):
                made = decoded(store.read(position, expert))
                width = width_of(layer.expert_views(expert))
                layer.set_expert(expert, pad_width(made, width))
    return LoadedModel(model, load_tokenizer(directory), MoESpec.from_config(config))
