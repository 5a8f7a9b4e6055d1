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
from moekit.core.result_shape import STOCK_ALIGN, ResultShape, result_shape
from moekit.core.rewrite import EncodedExpert, Read, Rewrite, changes_others
from moekit.core.router_edit import edit_router_tensor, with_dead_entries
from moekit.core.spec import MoESpec, spec_of
from moekit.core.spill import Spill
from moekit.core.view import MoEView

Result = ExpertWeights | EncodedExpert


@dataclass(frozen=True)
class ResultLayer:
    """The computed experts of a layer: `slots` are the original ids at the places of the router,
    None for a dead one; `make(id)` computes an expert, which is to be padded to `width`, and
    `unrounded(id)` the same before the bits of the plan."""

    slots: list[int | None]
    make: Callable[[int], Result]
    unrounded: Callable[[int], Result]
    width: int


@dataclass
class Applied:
    """The model after a plan: config, meta-device model, tensors, experts (before, after) of the
    layers whose number changed, and what the user should know.

    `computed` has the layers whose experts are computed, by decoder layer; `tensors` has them too,
    dense.
    """

    config: PretrainedConfig
    model: PreTrainedModel
    tensors: dict[str, Deferred]
    experts: dict[int, tuple[int, int]]
    notes: list[str]
    computed: dict[int, ResultLayer]


def apply_plan(
    plan: ExpertPlan,
    config: PretrainedConfig,
    model: PreTrainedModel,
    tensors: dict[str, Deferred],
    *,
    rewrite: Rewrite | None = None,
    codec_at: CodecAt,
    scratch: Path,
    uneven: bool = False,
    align: int = STOCK_ALIGN,
) -> Applied:
    """Apply `plan` to the parameters `tensors` of `model` (on the meta device, built of `config`).

    Router rows, biases and whatever else has one entry per expert are edited as the plan says; the
    experts are computed when they are read, by `rewrite` where there is one. `codec_at` gives the
    codec for bits; `scratch` is a directory for the experts of one layer; `uneven` and `align` are
    as for `result_shape`. Raises `UserError` for a plan that does not fit the model and where no
    class could hold the result.
    """
    spec = spec_of(model, config)
    plan.validate(spec)
    experts_of = NewExperts(plan, rewrite, codec_at)
    for layer in spec.per_layer:
        experts_of.check_bits(layer, plan.survivors(layer.layer_index, layer.num_experts))
    shape = result_shape(plan, spec, config, model, uneven=uneven, align=align)
    made = dict(tensors)
    _edit_routers(plan, spec, model, shape, made)
    computed = _new_banks(experts_of, spec, config, shape, tensors, made, Spill(scratch))
    _replace_values(plan, made)
    if changes_others(rewrite):
        assert rewrite is not None
        _change_others(rewrite, spec, made, _bank_names(model))
    before = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    after = {i: sum(s is not None for s in ids) for i, ids in shape.slots.items()}
    experts = {} if before == after else {i: (before[i], after[i]) for i in before}
    notes = [*shape.notes, *_alias_notes(plan, shape, uneven)]
    return Applied(shape.config, shape.model, made, experts, notes, computed)


def _alias_notes(plan: ExpertPlan, shape: ResultShape, shares: bool) -> list[str]:
    aliased = [i for i in plan.routers if len(set(shape.slots[i])) < len(shape.slots[i])]
    if shares or not any(plan.router(i) == "alias" for i in aliased):
        return []
    return [
        f"{len(aliased)} layers lead several router rows to one expert: it is written as copies, "
        "one for each row. --to packed stores it once."
    ]


def _edit_routers(
    plan: ExpertPlan,
    spec: MoESpec,
    model: PreTrainedModel,
    shape: ResultShape,
    made: dict[str, Deferred],
) -> None:
    """Edit what has one entry per expert; the experts themselves among it are only selected."""
    dead = any(None in ids for ids in shape.slots.values())
    if not dead and not any(_changes_router(plan, layer.layer_index) for layer in spec.per_layer):
        return
    banks = _bank_names(model)
    paths = {layer.path: layer.layer_index for layer in spec.per_layer}
    before = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    for name, axis in _axes(model).items():
        if name not in made:
            continue
        index = layer_of(name, paths)
        if index is None:
            raise UserError(
                f"{spec.model_type}: {name} also depends on the number of experts but belongs to "
                "no MoE layer, so experts cannot be dropped."
            )
        slots = shape.slots[index]
        if name in banks:
            kept = [slot for slot in slots if slot is not None]
            entries = axis.entries(kept, before[index], made[name].shape[axis.axis])
            selected: Any = made[name].index_select(axis.axis, torch.tensor(entries))
            made[name] = selected
            continue
        edited = edit_router_tensor(plan, index, before[index], axis, made[name])
        made[name] = with_dead_entries(name, edited, axis, slots)


def _changes_router(plan: ExpertPlan, layer: int) -> bool:
    kind = plan.router(layer)
    folds = kind != "alias" and any(len(group) > 1 for group in plan.groups(layer).values())
    return bool(plan.dropped(layer)) or folds or kind == "linear"


def _bank_names(model: PreTrainedModel) -> set[str]:
    return {full for site in find_moe(model) for _, full in bank_names(site)}


def _axes(model: PreTrainedModel) -> dict[str, ExpertAxis]:
    count = max(layer.num_experts for layer in MoEView(model))
    return expert_axes(model, meta_model(with_num_experts(model.config, 2 * count)))


def _new_banks(
    experts_of: NewExperts,
    spec: MoESpec,
    config: PretrainedConfig,
    shape: ResultShape,
    tensors: dict[str, Deferred],
    made: dict[str, Deferred],
    spill: Spill,
) -> dict[int, ResultLayer]:
    """Put banks of computed experts into `made` for the layers where experts change."""
    changed = set()
    for each in spec.per_layer:
        index, slots = each.layer_index, shape.slots[each.layer_index]
        kept = [slot for slot in slots if slot is not None]
        same = len(kept) == len(slots) and shape.widths[index] == each.expert_width
        if not same or not experts_of.unchanged(index, kept):
            changed.add(index)
    if not changed:
        return {}
    sources = expert_sources(tensors, config)
    sites, layers = find_moe(shape.model), MoEView(shape.model).layers
    computed = {}
    for source, site, layer in zip(sources, sites, layers, strict=True):
        index = source.spec.layer_index
        if index not in changed:
            continue
        make = functools.partial(_result, experts_of, source)
        unrounded = functools.partial(_result, experts_of.unrounded, source)
        slots, width = shape.slots[index], shape.widths[index]
        computed[index] = ResultLayer(slots, make, unrounded, width)
        dense = functools.partial(_dense, make, source.views(0).down.dtype)
        made.update(NewBanks(source, site, layer, slots, dense, spill, tensors).tensors())
    return computed


def _result(make: Callable[[int, int, Read], Result], source: ExpertSource, expert: int) -> Result:
    return make(source.spec.layer_index, expert, source.read)


def _dense(make: Callable[[int], Result], dtype: torch.dtype, expert: int) -> ExpertWeights:
    return decode_expert(make(expert), dtype)


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
