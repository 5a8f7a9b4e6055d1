"""From statistics to a plan that merges experts: a grouping, shares, an alignment and a fuser.

The four combine freely; a published method is one row of `methods`. E experts, F neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.compress.condense.context import Groups, LayerContext
from moekit.compress.condense.features import FEATURES
from moekit.compress.condense.fusers import GroupFuser
from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.prune.planning import rooms_of
from moekit.compress.prune.select import spread
from moekit.compress.quantize.layer_experts import middle_of
from moekit.compress.request import least_experts
from moekit.core.errors import UserError
from moekit.core.neurons import neuron_rows
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.plan_tensors import PlanTensors
from moekit.core.registry import registry
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats
from moekit.ops.align import match_activations, match_weights

ALIGNMENTS = ("none", "weights", "activations")
ROUTERS = ("alias", "mean", "slice")
UNIFORM = "uniform"
Grouping = Callable[[LayerContext, int], Groups]


@dataclass(frozen=True)
class Recipe:
    """How experts are merged.

    `grouping` and `fuser` are registered methods with their options. `importance` is the saliency
    that picks leaders, `shares` the one that weighs the members of a group (or "uniform"). `align`
    brings the neurons of every member into the order of its leader's: by weights, by activations
    on the sampled inputs, or not at all. `router`: "alias" keeps all rows, which lead to the merged
    expert, so that gates of members add up; "mean" gives it the mean of their rows by share,
    "slice" the row of its lowest member.
    """

    grouping: str = "hierarchical"
    fuser: str = "average"
    importance: str = "frequency"
    shares: str = "frequency"
    align: str = "none"
    router: str = "alias"
    grouping_options: Mapping[str, Any] = field(default_factory=dict)
    fuser_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("align", self.align, ALIGNMENTS),
            ("router", self.router, ROUTERS),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r} is unknown; there are {', '.join(known)}.")
        registry.find(self.grouping, kind="grouping")
        if not issubclass(self.fuser_class(), GroupFuser):
            raise UserError(f"fuser {self.fuser!r} belongs to a search, it takes no groups.")
        for score in {self.importance, self.shares} - {UNIFORM}:
            registry.find(score, kind="saliency")

    def sets(self) -> list[str]:
        """The sets of `moekit profile` that the recipe needs."""
        options = registry.find(self.grouping, kind="grouping").options
        defaults = {option.name: option.default for option in options}
        feature = self.grouping_options.get("feature", defaults.get("feature"))
        needed = [FEATURES[feature][1]] if feature in FEATURES else []
        if self.align == "activations":
            needed.append("inputs")
        needed += self.fuser_class().sets
        if self.fuser_options.get("information"):
            needed.append("fisher")
        return ["default", *dict.fromkeys(name for name in needed if name)]

    def fuser_class(self) -> type[GroupFuser]:
        found: Any = registry.find(self.fuser, kind="fuser").load()
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for records."""
        return asdict(self)


def condense_plan(
    spec: MoESpec,
    stats: ExpertStats,
    experts: ModelExperts,
    keep: Mapping[int, int],
    recipe: Recipe,
    *,
    seed: int = 0,
    protect: Mapping[int, Collection[int]] | None = None,
    stats_path: str | None = None,
) -> ExpertPlan:
    """The plan that leaves `keep` (decoder layer -> number) experts, merged by `recipe`.

    Protected experts stay alone. `stats_path` names the directory of `stats` in the plan, for
    fusers that read them again. Raises `UserError` for missing statistics and impossible options.
    """
    importance = _scores(recipe.importance, stats)
    shares = _scores(recipe.shares, stats)
    kernel = registry.find(recipe.grouping, kind="grouping").load()
    grouping = functools.partial(kernel, **recipe.grouping_options)
    blocks = {
        layer.layer_index: 1 if recipe.router == "alias" else layer.num_groups
        for layer in spec.per_layer
    }
    layers: dict[int, dict[int, Action]] = {}
    neurons: dict[tuple[int, int], Tensor] = {}
    for position, layer in enumerate(stats.layers):
        context = LayerContext(
            stats, position, importance[position], _reader(experts, position), seed
        )
        alone = (protect or {}).get(layer.index, ())
        groups = _grouped(context, keep[layer.index], grouping, blocks[layer.index], alone)
        layers[layer.index] = _actions(groups, shares[position])
        for group in groups.groups:
            found = _orders(context, group, recipe.align, experts)
            neurons.update({(layer.index, e): order for e, order in found.items()})
        layers[layer.index].update({e: Action(protect=True) for e in alone})
    merged = any(a.group is not None for actions in layers.values() for a in actions.values())
    routers = dict.fromkeys(layers, recipe.router) if merged else {}
    fit = None
    if not recipe.fuser_class().linear:
        fit = Fit(recipe.fuser, stats_path, dict(recipe.fuser_options))
    return ExpertPlan(
        layers,
        Fingerprint.of(spec),
        f"condense: {recipe.grouping} + {recipe.fuser}",
        routers,
        PlanTensors(neurons=neurons),
        fit,
    )


def spread_over_layers(
    spec: MoESpec,
    stats: ExpertStats,
    keep: Mapping[int, int],
    importance: str,
    protect: Mapping[int, Collection[int]] | None = None,
) -> dict[int, int]:
    """`keep` with its total spread over the layers by one threshold on importance (M-SMoE).

    No layer goes below what its router needs. Raises `UserError` where that is too much.
    """
    rooms = rooms_of(spec, keep, protect)
    least = [least_experts(layer) for layer in spec.per_layer]
    return {room.layer: room.count for room in spread(rooms, _scores(importance, stats), least)}


def anyhow(spec: MoESpec, keep: Mapping[int, int], router: str) -> ExpertPlan:
    """A plan of the same size that merges neighbours, for forecasts: nothing is read or run."""
    layers = {}
    for layer in spec.per_layer:
        count, experts = keep[layer.layer_index], layer.num_experts
        inner = count // layer.num_groups
        size = experts // layer.num_groups
        slots = [e // size * inner + e % size % inner for e in range(experts)]
        groups = [[e for e in range(experts) if slots[e] == slot] for slot in range(count)]
        layers[layer.layer_index] = _actions(Groups(groups), torch.ones(experts).double())
    return ExpertPlan(layers, Fingerprint.of(spec), routers=dict.fromkeys(layers, router))


def _reader(experts: ModelExperts, position: int) -> Any:
    return lambda e: experts.read(position, e)


def _scores(name: str, stats: ExpertStats) -> list[Tensor]:
    if name == UNIFORM:
        return [torch.ones(layer.num_experts).double() for layer in stats.layers]
    found: list[Tensor] = registry.find(name, kind="saliency").load()(stats)
    return found


def _grouped(
    context: LayerContext, count: int, grouping: Grouping, blocks: int, apart: Collection[int]
) -> Groups:
    """The grouping's answer in each of `blocks` equal parts of the layer; `apart` stay alone.

    A router that is limited by groups of experts must keep as many in each, so its groups are the
    blocks.
    """
    experts, size = context.num_experts, context.num_experts // blocks
    found = Groups([[e] for e in range(experts)] if count == experts else [])
    for first in range(0, experts if count < experts else 0, size):
        inside = range(first, first + size)
        alone = [e for e in inside if e in apart]
        rest = [e for e in inside if e not in apart]
        left = count // blocks - len(alone)
        if left < 1 and rest:
            raise UserError(
                f"layer {context.index}: {len(alone)} protected experts leave no room for the "
                f"{len(rest)} others in {count // blocks}; keep more or protect fewer."
            )
        inner = grouping(context.only(rest), left) if rest else Groups([])
        found.groups.extend([[e] for e in alone])
        found.groups.extend([rest[e] for e in group] for group in inner.groups)
        found.dropped.extend(rest[e] for e in inner.dropped)
    found.check(context, count)
    return found


def _actions(groups: Groups, shares: Tensor) -> dict[int, Action]:
    actions = {e: Action(drop=True) for e in groups.dropped}
    for group in groups.groups:
        if len(group) == 1:
            continue
        # A saliency may be negative (mean logits) or zero for all that no token chose.
        held = shares[group].clamp_min(0)
        held = held / held.sum() if held.sum() > 0 else torch.full_like(held, 1 / len(group))
        for e, share in zip(group, held.tolist(), strict=True):
            actions[e] = Action(group=min(group), weight=share)
    return actions


def _orders(
    context: LayerContext, group: Sequence[int], align: str, experts: ModelExperts
) -> dict[int, Tensor]:
    """The order of neurons of every member that is not already in that of its leader."""
    if align == "none" or len(group) == 1:
        return {}
    leader = context.read(group[0])
    if align == "weights":
        first = neuron_rows(leader)
        orders = {e: match_weights(first, neuron_rows(context.read(e))) for e in group[1:]}
    else:
        hidden = _inputs_of(context, group)
        layer = experts.layers[context.position]
        middle = middle_of(layer, leader, hidden)
        orders = {
            e: match_activations(middle, middle_of(layer, context.read(e), hidden))
            for e in group[1:]
        }
    return {e: o for e, o in orders.items() if not torch.equal(o, torch.arange(len(o)))}


def _inputs_of(context: LayerContext, group: Sequence[int]) -> Tensor:
    """The sampled inputs that went to a member of the group; all where hardly any did."""
    hidden = context.stats.get(context.position, "sample_hidden")
    ids = context.stats.get(context.position, "sample_ids")
    chosen = torch.isin(ids, torch.tensor(group)).any(1)
    return hidden[chosen] if int(chosen.sum()) > 1 else hidden
