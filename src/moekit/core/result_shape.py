"""What the model after a plan looks like: which expert stands where, and how wide each is.

Stock classes need the same number of experts in every MoE layer. Where layers keep different
numbers, the smaller ones get dead experts where the router has a bias that keeps them from ever
being chosen; a packed model holds the numbers as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import meta_model
from moekit.core.errors import UserError
from moekit.core.expert_width import with_expert_width
from moekit.core.layer_spec import LayerSpec
from moekit.core.layout import with_num_experts
from moekit.core.new_experts import resulting_width
from moekit.core.plan import ExpertPlan
from moekit.core.router_edit import router_slots
from moekit.core.spec import MoESpec, spec_of
from moekit.core.uneven import with_layers
from moekit.core.view import MoEView

# Routers that hold expert ids or coordinates as data, not one row per expert.
FIXED_SELECTION = ("hash", "product_key")
# grouped_mm needs rows of a multiple of 16 bytes.
STOCK_ALIGN = 8
Slots = list[int | None]


@dataclass(frozen=True)
class ResultShape:
    """Config and meta-device model after a plan; per decoder layer the original id of the expert at
    each place of the router (None for a dead one) and the width of its experts."""

    config: PretrainedConfig
    model: PreTrainedModel
    slots: dict[int, Slots]
    widths: dict[int, int]
    notes: list[str] = field(default_factory=list)


def result_shape(
    plan: ExpertPlan,
    spec: MoESpec,
    config: PretrainedConfig,
    model: PreTrainedModel,
    *,
    uneven: bool = False,
    align: int = STOCK_ALIGN,
) -> ResultShape:
    """The shape after `plan`. With `uneven` layers may differ in experts and widths, which only a
    packed model holds. Widths are rounded up to a multiple of `align`.

    Raises `UserError` where no class could hold the result.
    """
    layers = spec.per_layer
    slots: dict[int, Slots] = {
        layer.layer_index: list(router_slots(plan, layer.layer_index, layer.num_experts))
        for layer in layers
    }
    before = {layer.layer_index: layer.num_experts for layer in layers}
    widths = {layer.layer_index: _width(plan, layer, align) for layer in layers}
    notes: list[str] = []
    if any(len(slots[index]) != count for index, count in before.items()):
        _refuse_fixed_selection(spec)
        counts = {index: len(ids) for index, ids in slots.items()}
        if len(set(counts.values())) > 1 and not uneven:
            slots = _with_dead(slots, spec, model)
            dead = sum(slot is None for ids in slots.values() for slot in ids)
            notes.append(
                f"Layers keep {min(counts.values())} to {max(counts.values())} experts: the others "
                f"have dead ones ({dead} in all), which their router never chooses."
            )
    counts = {index: len(ids) for index, ids in slots.items()}
    originals = {layer.layer_index: layer.expert_width for layer in layers}
    if uneven and (len(set(counts.values())) > 1 or len(set(widths.values())) > 1):
        held = _held_widths(config, widths, originals)
        made = with_layers(config, counts, held)
        return ResultShape(made, meta_model(made), slots, widths, notes)
    made = config
    if counts != before:
        made = with_num_experts(config, next(iter(counts.values())))
    if widths != originals:
        widest = dict.fromkeys(widths, max(widths.values()))
        try:
            made = with_expert_width(made, max(widths.values()), meta_model)
        except UserError:
            widest = widest if uneven else originals
            notes.append(
                f"{config.model_type} has no config field for the width of its routed experts "
                "alone" + ("." if uneven else ": neurons that are cut are written as zeros.")
            )
        widths = widest
    if made is config:
        return ResultShape(config, model, slots, widths, notes)
    changed = meta_model(made)
    _check_result(spec, spec_of(changed, made), counts)
    return ResultShape(made, changed, slots, widths, notes)


def _width(plan: ExpertPlan, layer: LayerSpec, align: int) -> int:
    index, width = layer.layer_index, layer.expert_width
    kept = plan.survivors(index, layer.num_experts)
    widest = max(resulting_width(plan, index, e, width) for e in kept)
    return min(width, -(-widest // align) * align)


def _held_widths(
    config: PretrainedConfig, widths: Mapping[int, int], originals: Mapping[int, int]
) -> Mapping[int, int]:
    """The widths that the config can say; the records of a packed model know their own."""
    try:
        for width in set(widths.values()):
            with_expert_width(config, width, meta_model)
    except UserError:
        return originals
    return widths


def _with_dead(slots: dict[int, Slots], spec: MoESpec, model: PreTrainedModel) -> dict[int, Slots]:
    """All layers with as many places as the largest, group by group."""
    largest = max(len(ids) for ids in slots.values())
    padded = {}
    for layer, held in zip(spec.per_layer, MoEView(model), strict=True):
        ids = slots[layer.layer_index]
        if len(ids) < largest and not _can_bar(layer, held.router_bias is not None):
            low = min(slots, key=lambda index: len(slots[index]))
            high = max(slots, key=lambda index: len(slots[index]))
            raise UserError(
                f"The plan leaves {len(slots[low])} experts in layer {low} and {largest} in layer "
                f"{high}. Stock model classes need the same number in every MoE layer, and the "
                f"router of {spec.model_type} has no bias by which to keep dead experts from being "
                "chosen. Keep as many in each layer, or write --to packed, which holds "
                "different numbers."
            )
        groups = layer.num_groups
        share, size = len(ids) // groups, largest // groups
        padded[layer.layer_index] = [
            slot
            for group in range(groups)
            for slot in [*ids[group * share : (group + 1) * share], *[None] * (size - share)]
        ]
    return padded


def _can_bar(layer: LayerSpec, has_router_bias: bool) -> bool:
    """Whether a place of the router can be kept from ever being chosen without a trace."""
    if has_router_bias:
        return True
    # A logit of 0 takes a share of a softmax, which only a later normalisation undoes.
    unseen = layer.score == "sigmoid" or bool(layer.normalize)
    return layer.has_correction_bias and unseen


def _refuse_fixed_selection(spec: MoESpec) -> None:
    for layer in spec.per_layer:
        if layer.selection in FIXED_SELECTION:
            raise UserError(
                f"Layer {layer.layer_index} of {spec.model_type} chooses experts by "
                f"{layer.selection.replace('_', ' ')}, which has no rows to drop."
            )


def _check_result(before: MoESpec, after: MoESpec, counts: Mapping[int, int]) -> None:
    changed = [layer.num_experts for layer in after.per_layer]
    wanted = [counts[layer.layer_index] for layer in before.per_layer]
    if changed != wanted:
        raise UserError(
            f"The config of {before.model_type} cannot be set to {wanted[0]} experts in every MoE "
            f"layer; it gives {changed}."
        )
