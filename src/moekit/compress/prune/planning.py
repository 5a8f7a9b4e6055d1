"""From the request and the scores to an `ExpertPlan` that drops experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch

from moekit.compress.prune.saliency import score
from moekit.compress.prune.select import Room, spread
from moekit.compress.request import check_counts, check_protected, least_experts
from moekit.core.plan import Action, ExpertPlan, Fingerprint
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats

Scope = Literal["layer", "global"]
Protect = Mapping[int, Collection[int]]


def rooms_of(spec: MoESpec, keep: Mapping[int, int], protect: Protect | None = None) -> list[Room]:
    """One room for each MoE layer in order; `keep` and `protect` go by decoder layer.

    Raises UserError where a router needs more experts than are to stay, and for protected experts
    that do not exist or are too many.
    """
    check_counts(spec, keep)
    check_protected(spec, keep, protect or {})
    return [
        Room(
            layer.layer_index,
            layer.num_experts,
            keep[layer.layer_index],
            layer.num_groups,
            frozenset((protect or {}).get(layer.layer_index, ())),
        )
        for layer in spec.per_layer
    ]


def plan_of(
    spec: MoESpec, rooms: Sequence[Room], keep: Sequence[Sequence[int]], note: str
) -> ExpertPlan:
    """The plan that keeps `keep` in each layer, protects what the rooms protect, drops the rest."""
    layers = {}
    for room, kept in zip(rooms, keep, strict=True):
        actions = {e: Action(drop=True) for e in room.gone(kept)}
        actions |= {e: Action(protect=True) for e in room.protected}
        layers[room.layer] = actions
    return ExpertPlan(layers, Fingerprint.of(spec), note)


def any_plan(
    spec: MoESpec, keep: Mapping[int, int], scope: Scope = "layer", protect: Protect | None = None
) -> ExpertPlan:
    """A plan of the size that is asked for, before anything is measured.

    For a forecast, and to find out what the writer refuses; with scope "global" the layers differ
    as much as they may.
    """
    rooms = rooms_of(spec, keep, protect)
    alike = [torch.ones(room.num_experts) for room in rooms]
    if scope == "global":
        rooms = spread(rooms, alike, [least_experts(layer) for layer in spec.per_layer])
    kept = [room.best(layer) for room, layer in zip(rooms, alike, strict=True)]
    return plan_of(spec, rooms, kept, f"prune: any experts, {scope} budget")


def prune(
    spec: MoESpec,
    stats: ExpertStats,
    method: str,
    keep: Mapping[int, int],
    *,
    scope: Scope = "layer",
    protect: Protect | None = None,
    domain: str | None = None,
    by_domain: bool = False,
    **options: Any,
) -> ExpertPlan:
    """Plan to keep the experts that score highest under the saliency `method`.

    `keep` is the number of experts by decoder layer; with scope "global" only their sum counts, and
    one threshold over all layers decides. `protect` are experts that stay whatever they score.
    `domain`, `by_domain` and the method's `options` are those of `saliency.score`. Raises UserError
    for what does not fit the model or the stats.
    """
    stats.validate(spec)
    rooms = rooms_of(spec, keep, protect)
    scores = score(stats, method, domain=domain, by_domain=by_domain, **options)
    if scope == "global":
        rooms = spread(rooms, scores, [least_experts(layer) for layer in spec.per_layer])
    kept = [room.best(layer) for room, layer in zip(rooms, scores, strict=True)]
    return plan_of(spec, rooms, kept, f"prune: {method}, {scope} budget")
