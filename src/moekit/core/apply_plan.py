"""Applying an `ExpertPlan` to a checkpoint that is only described, not loaded: dropping experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.layout import expert_axes, layer_of, with_num_experts
from moekit.core.plan import ExpertPlan
from moekit.core.spec import MoESpec, spec_of

APPLIED = {"drop", "protect"}
# Routers that hold expert ids or coordinates as data, not one row per expert.
FIXED_SELECTION = ("hash", "product_key")


@dataclass
class Applied:
    """The model after a plan: config, meta-device model, tensors, and experts (before, after)."""

    config: PretrainedConfig
    model: PreTrainedModel
    tensors: dict[str, Deferred]
    experts: dict[int, tuple[int, int]]


def apply_plan(
    plan: ExpertPlan,
    config: PretrainedConfig,
    model: PreTrainedModel,
    tensors: dict[str, Deferred],
) -> Applied:
    """Apply `plan` to the parameters `tensors` of `model` (on the meta device, built of `config`).

    Expert weights, router rows, biases and whatever else has one entry per expert lose the entries
    of dropped experts. Raises `UserError` for a plan that does not fit the model, for actions other
    than `APPLIED`, and where no stock class could hold the result.
    """
    spec = spec_of(model, config)
    plan.validate(spec)
    others = [name for name in plan.uses() if name not in APPLIED]
    if others:
        raise UserError(
            f"The plan asks for {', '.join(others)}; convert applies "
            f"{' and '.join(sorted(APPLIED))} only. Take {', '.join(others)} out of the plan."
        )
    kept = {
        layer.layer_index: plan.survivors(layer.layer_index, layer.num_experts)
        for layer in spec.per_layer
    }
    before = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    if all(len(kept[index]) == count for index, count in before.items()):
        return Applied(config, model, tensors, {})
    count = _common_count(kept, before)
    _refuse_fixed_selection(spec)
    smaller_config = with_num_experts(config, count)
    smaller = meta_model(smaller_config)
    _check_result(spec, spec_of(smaller, smaller_config), count)
    paths = {layer.path: layer.layer_index for layer in spec.per_layer}
    made = dict(tensors)
    for name, axis in expert_axes(model, smaller).items():
        if name not in tensors:
            continue
        index = layer_of(name, paths)
        if index is None:
            raise UserError(
                f"{spec.model_type}: {name} also depends on the number of experts but belongs to "
                "no MoE layer, so experts cannot be dropped."
            )
        tensor = tensors[name]
        entries = axis.entries(kept[index], before[index], tensor.shape[axis.axis])
        selected: Any = tensor.index_select(axis.axis, torch.tensor(entries))
        made[name] = selected
    experts = {index: (before[index], count) for index in kept}
    return Applied(smaller_config, smaller, made, experts)


def _common_count(kept: dict[int, list[int]], before: dict[int, int]) -> int:
    counts = {index: len(ids) for index, ids in kept.items()}
    low, high = (pick(counts, key=lambda index: counts[index]) for pick in (min, max))
    if counts[low] != counts[high]:
        raise UserError(
            f"The plan leaves {counts[low]} of {before[low]} experts in layer {low} and "
            f"{counts[high]} of {before[high]} in layer {high}. Stock model classes need the same "
            "number in every MoE layer; drop as many in each."
        )
    return counts[low]


def _refuse_fixed_selection(spec: MoESpec) -> None:
    for layer in spec.per_layer:
        if layer.selection in FIXED_SELECTION:
            raise UserError(
                f"Layer {layer.layer_index} of {spec.model_type} chooses experts by "
                f"{layer.selection.replace('_', ' ')}, which has no rows to drop."
            )


def _check_result(before: MoESpec, after: MoESpec, count: int) -> None:
    changed = [layer.num_experts for layer in after.per_layer]
    if changed != [count] * len(before.per_layer):
        raise UserError(
            f"The config of {before.model_type} cannot be set to {count} experts in every MoE "
            f"layer; it gives {changed}."
        )
