"""The experts of a checkpoint one by one, whatever the family's storage, without loading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import MoESite, find_moe
from moekit.core.layer import MoELayer
from moekit.core.layer_spec import LayerSpec, describe_layer, expert_tensors
from moekit.core.view import MoEView


@dataclass(frozen=True)
class ExpertSource:
    """The experts of one MoE layer: its description, the experts as deferred matrices by id, and
    the names of the tensors that hold them."""

    spec: LayerSpec
    views: Callable[[int], ExpertWeights]
    names: list[str]

    def read(self, expert: int) -> ExpertWeights:
        """The values of one expert, read now."""
        parts = self.views(expert)
        loaded = {}
        for name, part in parts.tensors().items():
            assert isinstance(part, Deferred)
            loaded[name] = part.read()
        return dataclasses.replace(parts, **loaded)


def expert_sources(tensors: Mapping[str, Deferred], config: PretrainedConfig) -> list[ExpertSource]:
    """The MoE layers of the model of `config`, whose parameters are `tensors`.

    Raises `UserError` for models whose experts cannot be read one by one.
    """
    model = meta_model(config)
    found = []
    for site, layer in zip(find_moe(model), MoEView(model).layers, strict=True):
        spec = describe_layer(site, config)
        names = []
        for name, full in bank_names(site):
            if full not in tensors:
                raise UserError(
                    f"{full} is stored under the name of another layer: a model whose layers "
                    "share their experts cannot be packed, nor its experts be rewritten."
                )
            replace_parameter(site.experts, name, tensors[full])
            names.append(full)
        _check_coverage(layer, spec)
        found.append(ExpertSource(spec, layer.expert_views, names))
    return found


def bank_names(site: MoESite) -> list[tuple[str, str]]:
    """The parameters that hold the experts of a layer: (name below the experts module, name)."""
    prefixes = expert_tensors(site)
    return [
        (name, f"{site.experts_path}.{name}" if site.experts_path else name)
        for name, _ in site.experts.named_parameters()
        if name.startswith(prefixes)
    ]


def replace_parameter(module: nn.Module, name: str, tensor: Any) -> None:
    """Put a tensor in the place of a parameter without making it one."""
    path, _, leaf = name.rpartition(".")
    # A parameter insists on real data; the handles of a layer only read the attribute.
    module.get_submodule(path)._parameters[leaf] = tensor


def _check_coverage(layer: MoELayer, spec: LayerSpec) -> None:
    parts = layer.expert_views(0).tensors().values()
    held = sum(part.numel() for part in parts)
    if held != spec.params_per_expert or not all(isinstance(part, Deferred) for part in parts):
        raise UserError(
            f"{layer.name}: the matrices of an expert have {held} weights, the layer stores "
            f"{spec.params_per_expert} for each; experts of this family cannot be rewritten or "
            "packed."
        )
