"""Whether an `ExpertPlan` can be applied to a model: every refusal names the numbers."""

from __future__ import annotations

from collections import Counter

from moekit.core.errors import UserError
from moekit.core.new_experts import resulting_width
from moekit.core.plan import ExpertPlan, Fingerprint, LayerLike, SpecLike
from moekit.core.router_edit import router_slots

MAX_BITS = 32
# A group whose rank is the sum of its two best scores needs two experts.
MIN_PER_GROUP = {"top2": 2}


def check_plan(plan: ExpertPlan, spec: SpecLike) -> None:
    """Raise `UserError` unless `plan` fits the layers, experts and routing rules of `spec`."""
    actual = Fingerprint.of(spec)
    if plan.model is not None and plan.model != actual:
        raise UserError(
            f"The plan is for another model: {plan.model.describe()}; this one has "
            f"{actual.describe()}{_first_difference(plan.model, actual)}."
        )
    layers = {layer.layer_index: layer for layer in spec.per_layer}
    if plan.layers and len(layers) < len(spec.per_layer):
        counts = Counter(layer.layer_index for layer in spec.per_layer)
        twice = counts.most_common(1)[0][0]
        raise UserError(
            f"{spec.model_type} has {counts[twice]} sets of experts with layer number {twice}; "
            "plans go by layer number and cannot tell them apart."
        )
    neurons = plan.tensors.neurons
    for index in sorted({*plan.layers, *plan.routers, *(layer for layer, _ in neurons)}):
        if index not in layers:
            known = sorted(layers)
            raise UserError(
                f"The plan has layer {index}, which is no MoE layer; those are "
                f"{_ranges(known)} ({len(known)} layers)."
            )
        _check_experts(plan, layers[index])
        _check_neurons(plan, layers[index])
        _check_map(plan, layers[index])
        _check_routing(plan, layers[index])


def _first_difference(expected: Fingerprint, actual: Fingerprint) -> str:
    if expected.layers != actual.layers:
        return f" (layers {_ranges(actual.layers)} instead of {_ranges(expected.layers)})"
    pairs = zip(actual.layers, actual.num_experts, expected.num_experts, strict=True)
    for layer, now, wanted in pairs:
        if now != wanted:
            return f" (layer {layer}: {now} experts instead of {wanted})"
    return ""


def _check_experts(plan: ExpertPlan, layer: LayerLike) -> None:
    # A fitted rank may be that of a projection which several experts share.
    max_rank = min(layer.hidden_size, layer.expert_width)
    rank_range = (1, max_rank, f" (the smaller of width {layer.expert_width} and hidden size)")
    if plan.fit is not None:
        rank_range = (1, layer.hidden_size, " (the hidden size)")
    limits = {
        "bits": (0, MAX_BITS, ""),
        "rank": rank_range,
        "width": (1, layer.expert_width, ""),
    }
    for expert, action in plan.layers.get(layer.layer_index, {}).items():
        where = f"layer {layer.layer_index}, expert {expert}"
        if not 0 <= expert < layer.num_experts:
            raise UserError(
                f"The plan has {where}; the layer has experts 0 to {layer.num_experts - 1}."
            )
        for name, (low, high, why) in limits.items():
            value = getattr(action, name)
            if value is not None and not (low <= value <= high and value > 0):
                raise UserError(
                    f"The plan gives {where} {name} {value:g}; it must be at most {high}{why} "
                    "and above 0."
                )
    for leader, members in plan.groups(layer.layer_index).items():
        if not any(members.values()):
            raise UserError(
                f"The plan folds experts {sorted(members)} of layer {layer.layer_index} into "
                f"expert {leader} with weights that are all 0."
            )


def _check_neurons(plan: ExpertPlan, layer: LayerLike) -> None:
    index = layer.layer_index
    for (at, expert), order in plan.tensors.neurons.items():
        if at != index:
            continue
        where = f"layer {index}, expert {expert}"
        if not 0 <= expert < layer.num_experts:
            raise UserError(
                f"The plan orders the neurons of {where}; the layer has experts 0 to "
                f"{layer.num_experts - 1}."
            )
        ids = order.tolist()
        if (
            not ids
            or len(set(ids)) < len(ids)
            or not 0 <= min(ids) <= max(ids) < layer.expert_width
        ):
            raise UserError(
                f"The plan gives {where} {len(ids)} neurons, which must be different numbers from "
                f"0 to {layer.expert_width - 1}."
            )
    for expert in plan.survivors(index, layer.num_experts):
        resulting_width(plan, index, expert, layer.expert_width)


def _check_map(plan: ExpertPlan, layer: LayerLike) -> None:
    matrix = plan.tensors.router_maps.get(layer.layer_index)
    if matrix is None:
        return
    kept = len(plan.survivors(layer.layer_index, layer.num_experts))
    if list(matrix.shape) != [kept, layer.num_experts]:
        raise UserError(
            f"The plan's router map of layer {layer.layer_index} is {list(matrix.shape)}; "
            f"{kept} of {layer.num_experts} experts are left, so it must be "
            f"[{kept}, {layer.num_experts}]."
        )


def _check_routing(plan: ExpertPlan, layer: LayerLike) -> None:
    # Of an alias table all rows stay, though they lead to fewer experts.
    slots = router_slots(plan, layer.layer_index, layer.num_experts)
    gone = set(plan.dropped(layer.layer_index))
    aliased = plan.router(layer.layer_index) == "alias"
    kept = [e for e in range(layer.num_experts) if e not in gone] if aliased else slots
    where = f"layer {layer.layer_index}"
    if len(kept) < layer.top_k:
        raise UserError(
            f"The plan leaves {len(kept)} of {layer.num_experts} experts in {where}, but its "
            f"router chooses {layer.top_k} (top_k). Keep at least {layer.top_k}."
        )
    if layer.num_groups <= 1 or len(kept) == layer.num_experts:
        return
    size = layer.num_experts // layer.num_groups
    counts = Counter(expert // size for expert in kept)
    per_group = [counts[group] for group in range(layer.num_groups)]
    if len(set(per_group)) > 1:
        raise UserError(
            f"The plan leaves {per_group} experts in the {layer.num_groups} groups of {where} "
            f"({size} each before). Its router is limited by groups, so every group must keep "
            "the same number."
        )
    needed = max(
        -(-layer.top_k // layer.topk_groups), MIN_PER_GROUP.get(layer.group_score or "", 1)
    )
    if per_group[0] < needed:
        raise UserError(
            f"The plan leaves {per_group[0]} experts in every group of {where}; {needed} are "
            f"needed (top_k {layer.top_k} out of {layer.topk_groups} of {layer.num_groups} groups)."
        )


def _ranges(values: tuple[int, ...] | list[int]) -> str:
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"
