"""Models whose MoE layers differ in experts or widths, which no stock class can hold.

A config names the layers that differ in the field `LAYERS`; their blocks are then built from the
same class with those numbers and put in the place of the others. transformers ignores the field, so
it cannot load such a checkpoint; moekit reads it packed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from transformers import PretrainedConfig, PreTrainedModel

LAYERS = "moekit_layers"
Build = Callable[[PretrainedConfig], PreTrainedModel]


def with_layers(
    config: PretrainedConfig, counts: Mapping[int, int], widths: Mapping[int, int]
) -> PretrainedConfig:
    """A copy of `config` that gives each decoder layer its number of experts and their width."""
    changed = copy.deepcopy(config)
    layers = {str(i): {"num_experts": counts[i], "expert_width": widths[i]} for i in sorted(counts)}
    setattr(changed, LAYERS, layers)
    return changed


def without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` in which all layers are alike again."""
    changed = copy.deepcopy(config)
    if hasattr(changed, LAYERS):
        delattr(changed, LAYERS)
    return changed


def graft_layers(model: PreTrainedModel, config: PretrainedConfig, build: Build) -> None:
    """Replace the MoE blocks of `model` that the config describes otherwise."""
    from moekit.core.expert_width import with_expert_width
    from moekit.core.find import find_moe
    from moekit.core.layout import with_num_experts

    plain = without_layers(config)
    sizes = {
        int(index): (int(layer["num_experts"]), int(layer["expert_width"]))
        for index, layer in getattr(config, LAYERS).items()
    }
    for count, width in sorted(set(sizes.values())):
        other = build(with_expert_width(with_num_experts(plain, count), width, build))
        for site in find_moe(other):
            if sizes.get(site.layer_index) == (count, width):
                model.set_submodule(site.path, site.block)
