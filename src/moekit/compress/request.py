"""What is asked of a compression, checked against the model before anything expensive."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from moekit.core.errors import UserError
from moekit.core.memory import format_bytes
from moekit.core.plan_check import MIN_PER_GROUP
from moekit.core.spec import LayerSpec, MoESpec

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
ASSUMED_BYTES = 2


def experts_per_layer(
    spec: MoESpec,
    *,
    ratio: float | None = None,
    count: int | None = None,
    size: int | None = None,
) -> dict[int, int]:
    """Decoder layer -> experts to keep, by exactly one of three measures.

    `ratio` is the share of experts that goes (rounded down to whole experts), `count` how many stay
    in each layer, `size` the bytes that the whole model may take in its own number format. Routers
    that are limited by groups keep as many in every group: what would not divide is rounded up, for
    `size` down. Raises `UserError` where that leaves fewer experts than the router needs.
    """
    given = {"--ratio": ratio, "--experts": count, "--size": size}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError(
            f"give one of {', '.join(given)}, not {' and '.join(named) if named else 'none'}"
        )
    if ratio is not None and not 0 <= ratio < 1:
        raise UserError(f"--ratio {ratio:g} is the share of experts that goes: from 0 to below 1")
    keep = {}
    for layer in spec.per_layer:
        if ratio is not None:
            # Floor of the share that goes; the tiny term undoes rounding such as 0.29 * 100.
            left = layer.num_experts - math.floor(ratio * layer.num_experts + 1e-9)
        elif count is not None:
            left = count
        else:
            assert size is not None
            left = _fitting(spec, layer, size)
        groups = layer.num_groups
        keep[layer.layer_index] = (
            left // groups * groups if size is not None else -(-left // groups) * groups
        )
    check_counts(spec, keep)
    return keep


def check_counts(spec: MoESpec, keep: Mapping[int, int]) -> None:
    """Raise `UserError` unless every layer can keep so many experts."""
    for layer in spec.per_layer:
        left, index = keep[layer.layer_index], layer.layer_index
        if left > layer.num_experts:
            raise UserError(
                f"{left} experts are to stay in layer {index}, which has {layer.num_experts}"
            )
        least = least_experts(layer)
        if left < least:
            raise UserError(
                f"{left} of {layer.num_experts} experts would stay in layer {index}, and its "
                f"router needs {least} (top_k {layer.top_k}"
                + (f", {layer.num_groups} groups" if layer.num_groups > 1 else "")
                + "); ask for less"
            )
        if left % layer.num_groups:
            raise UserError(
                f"{left} experts of layer {index} do not divide into its {layer.num_groups} groups"
            )


def least_experts(layer: LayerSpec) -> int:
    """The smallest number of experts that the router of a layer can choose from."""
    if layer.num_groups <= 1:
        return layer.top_k
    chosen = -(-layer.top_k // layer.topk_groups)
    return layer.num_groups * max(chosen, MIN_PER_GROUP.get(layer.group_score or "", 1))


def check_protected(
    spec: MoESpec, keep: Mapping[int, int], protect: Mapping[int, Collection[int]]
) -> None:
    """Raise `UserError` for protected experts that do not exist or are more than stay."""
    layers = {layer.layer_index: layer for layer in spec.per_layer}
    for index, experts in protect.items():
        if index not in layers:
            raise UserError(f"layer {index} has protected experts but is no MoE layer")
        wrong = [e for e in experts if not 0 <= e < layers[index].num_experts]
        if wrong:
            raise UserError(
                f"layer {index} has experts 0 to {layers[index].num_experts - 1}; expert "
                f"{wrong[0]} cannot be protected"
            )
        if len(set(experts)) > keep[index]:
            raise UserError(
                f"layer {index} protects {len(set(experts))} experts and keeps {keep[index]}; "
                "keep more or protect fewer"
            )


def _fitting(spec: MoESpec, layer: LayerSpec, size: int) -> int:
    """Experts of a layer when all layers shrink alike until the model takes `size` bytes."""
    width = BYTES_OF_DTYPE.get(spec.dtype or "", ASSUMED_BYTES)
    routed = sum(each.num_experts * each.params_per_expert for each in spec.per_layer)
    rest = (spec.total_params - routed) * width
    share = (size - rest) / (routed * width)
    least = sum(least_experts(each) * each.params_per_expert for each in spec.per_layer) * width
    if size < rest + least:
        raise UserError(
            f"--size {format_bytes(size)} is too small: {format_bytes(rest)} are no routed "
            f"experts, and with the fewest the routers allow the model takes "
            f"{format_bytes(rest + least)}"
        )
    return min(layer.num_experts, math.floor(share * layer.num_experts + 1e-9))
