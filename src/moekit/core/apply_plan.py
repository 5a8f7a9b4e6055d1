"""Applying an `ExpertPlan` to a checkpoint that is only described, not loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.expert_source import ExpertSource, bank_names, expert_sources
from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import find_moe
from moekit.core.layout import ExpertAxis, expert_axes, layer_of, with_num_experts
from moekit.core.new_banks import NewBanks
from moekit.core.new_experts import CodecAt, NewExperts, decode_expert
from moekit.core.plan import ExpertPlan
from moekit.core.rewrite import EncodedExpert, Rewrite, changes_others
from moekit.core.router_edit import edit_router_tensor, router_slots
from moekit.core.spec import MoESpec, spec_of
from moekit.core.spill import Spill
from moekit.core.view import MoEView

# Routers that hold expert ids or coordinates as data, not one row per expert.
FIXED_SELECTION = ("hash", "product_key")


@dataclass
class Applied:
    """The model after a plan: config, meta-device model, tensors, experts (before, after) of the
    layers whose number changed, and what the user should know."""

    config: PretrainedConfig
    model: PreTrainedModel
    tensors: dict[str, Deferred]
    experts: dict[int, tuple[int, int]]
    notes: list[str]


def apply_plan(
    plan: ExpertPlan,
    config: PretrainedConfig,
    model: PreTrainedModel,
    tensors: dict[str, Deferred],
    *,
    rewrite: Rewrite | None = None,
    codec_at: CodecAt,
    scratch: Path,
) -> Applied:
    """Apply `plan` to the parameters `tensors` of `model` (on the meta device, built of `config`).

    Router rows, biases and whatever else has one entry per expert are edited as the plan says; the
    experts are computed when they are read, by `rewrite` where there is one. `codec_at` gives the
    codec for bits; `scratch` is a directory for the experts of one layer. Raises `UserError` for a
    plan that does not fit the model and where no stock class could hold the result.
    """
    spec = spec_of(model, config)
    plan.validate(spec)
    slots = {
        layer.layer_index: router_slots(plan, layer.layer_index, layer.num_experts)
        for layer in spec.per_layer
    }
    before = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    made, new_config, new_model = dict(tensors), config, model
    experts: dict[int, tuple[int, int]] = {}
    if any(len(slots[index]) != count for index, count in before.items()):
        count = _common_count(slots, before)
        _refuse_fixed_selection(spec)
        new_config = with_num_experts(config, count)
        new_model = meta_model(new_config)
        _check_result(spec, spec_of(new_model, new_config), count)
        experts = {index: (before[index], count) for index in slots}
    notes = [
        f"Layer {index}: the experts of a group are written as copies, one for each router row."
        for index, kind in plan.routers.items()
        if kind == "alias" and len(set(slots[index])) < len(slots[index])
    ]
    _edit_routers(plan, spec, model, new_model, made)
    experts_of = NewExperts(plan, rewrite, codec_at)
    _new_banks(experts_of, spec, config, new_model, tensors, made, slots, Spill(scratch))
    _replace_values(plan, made)
    if changes_others(rewrite):
        assert rewrite is not None
        _change_others(rewrite, spec, made, _bank_names(model))
    return Applied(new_config, new_model, made, experts, notes)


def _edit_routers(
    plan: ExpertPlan,
    spec: MoESpec,
    model: PreTrainedModel,
    new_model: PreTrainedModel,
    made: dict[str, Deferred],
) -> None:
    """Edit what has one entry per expert; the experts themselves among it are only selected."""
    if not any(_changes_router(plan, layer.layer_index) for layer in spec.per_layer):
        return
    banks = _bank_names(model)
    paths = {layer.path: layer.layer_index for layer in spec.per_layer}
    before = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    for name, axis in _axes(model, new_model).items():
        if name not in made:
            continue
        index = layer_of(name, paths)
        if index is None:
            raise UserError(
                f"{spec.model_type}: {name} also depends on the number of experts but belongs to "
                "no MoE layer, so experts cannot be dropped."
            )
        if name in banks:
            slots = router_slots(plan, index, before[index])
            entries = axis.entries(slots, before[index], made[name].shape[axis.axis])
            selected: Any = made[name].index_select(axis.axis, torch.tensor(entries))
            made[name] = selected
        else:
            made[name] = edit_router_tensor(plan, index, before[index], axis, made[name])


def _changes_router(plan: ExpertPlan, layer: int) -> bool:
    kind = plan.router(layer)
    folds = bool(plan.groups(layer)) and kind != "alias"
    return bool(plan.dropped(layer)) or folds or kind == "linear"


def _bank_names(model: PreTrainedModel) -> set[str]:
    return {full for site in find_moe(model) for _, full in bank_names(site)}


def _axes(model: PreTrainedModel, other: PreTrainedModel) -> dict[str, ExpertAxis]:
    if other is model:
        # The number stays, as with alias tables; any other number shows the axes.
        count = max(layer.num_experts for layer in MoEView(model))
        other = meta_model(with_num_experts(model.config, 2 * count))
    return expert_axes(model, other)


def _new_banks(
    experts_of: NewExperts,
    spec: MoESpec,
    config: PretrainedConfig,
    new_model: PreTrainedModel,
    tensors: dict[str, Deferred],
    made: dict[str, Deferred],
    slots: dict[int, list[int]],
    spill: Spill,
) -> None:
    """Put banks of computed experts into `made` for the layers where experts change."""
    changed = [
        layer.layer_index
        for layer in spec.per_layer
        if not experts_of.unchanged(layer.layer_index, slots[layer.layer_index])
    ]
    if not changed:
        return
    for spec_layer in spec.per_layer:
        experts_of.check_bits(spec_layer, slots[spec_layer.layer_index])
    sources = expert_sources(tensors, config)
    sites, layers = find_moe(new_model), MoEView(new_model).layers
    for source, site, layer in zip(sources, sites, layers, strict=True):
        index = source.spec.layer_index
        if index not in changed:
            continue
        make = functools.partial(_dense, experts_of, source)
        banks = NewBanks(source, site, layer, slots[index], make, spill, tensors)
        made.update(banks.tensors())


def _dense(experts_of: NewExperts, source: ExpertSource, expert: int) -> ExpertWeights:
    dtype = source.views(expert).down.dtype
    made: ExpertWeights | EncodedExpert = experts_of(source.spec.layer_index, expert, source.read)
    return decode_expert(made, dtype)


def _replace_values(plan: ExpertPlan, made: dict[str, Deferred]) -> None:
    for name, value in plan.tensors.values.items():
        if name not in made:
            raise UserError(f"The plan replaces {name}, which the model does not have.")
        if value.shape != made[name].shape:
            raise UserError(
                f"The plan replaces {name} by a tensor of shape {list(value.shape)}; the model "
                f"has {list(made[name].shape)}."
            )
        made[name] = _computed(made[name], functools.partial(_given, value))


def _given(value: Tensor, tensor: Deferred) -> Tensor:
    return value.to(tensor.dtype)


def _change_others(
    rewrite: Rewrite, spec: MoESpec, made: dict[str, Deferred], banks: set[str]
) -> None:
    """Pass everything in the decoder layers with experts, but the experts, through `rewrite`."""
    prefixes = tuple({decoder_layer(layer.path) for layer in spec.per_layer})
    for name, tensor in made.items():
        if name.startswith(prefixes) and name not in banks:
            made[name] = _computed(tensor, functools.partial(_changed, rewrite, name))


def decoder_layer(path: str) -> str:
    """The prefix of the names of everything in the decoder layer of the block at `path`."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1]) + "."


def _changed(rewrite: Rewrite, name: str, tensor: Deferred) -> Tensor:
    old = tensor.read()
    new = rewrite.other(name, old)
    if new.shape != old.shape:
        raise UserError(f"{name}: the rewrite gives {list(new.shape)} for {list(old.shape)}.")
    return new.to(old.dtype)


def _computed(tensor: Deferred, values: Callable[[Deferred], Tensor]) -> Deferred:
    """A tensor with the values that `values(tensor)` gives, computed once for all its pieces."""
    kept: list[Any] = []

    def read(region: Region) -> Tensor:
        if not kept:
            kept.append(values(tensor))
        block = kept[0][tuple(slice(a, b) for a, b in region)]
        if all(b == size for (_, b), size in zip(region, tensor.shape, strict=True)):
            kept.clear()
        return block

    return Deferred(tensor.shape, tensor.dtype, read)


def _common_count(slots: dict[int, list[int]], before: dict[int, int]) -> int:
    counts = {index: len(ids) for index, ids in slots.items()}
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
