"""Groups led by the most important experts. E experts."""

from __future__ import annotations

import numpy as np

from moekit.compress.condense.context import Groups, LayerContext
from moekit.compress.condense.features import distances
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed

KIND = "grouping"


@register(
    KIND,
    "dominant",
    title="The most important experts lead; each other one joins the nearest of them",
    paper="M-SMoE 2310.01334",
    needs=("data",),
    options={
        "feature": "what near means: router-logits, mean-output, output, output-cosine or weights",
        "capacity": "largest number of experts in a group; a full group takes no more",
    },
)
def dominant(
    context: LayerContext, count: int, *, feature: str = "router-logits", capacity: int = 0
) -> Groups:
    """Form `count` groups; experts choose in the order of their importance.

    `capacity` 0 sets no limit. Raises UserError where `count` groups of it cannot hold all experts.
    """
    if capacity and capacity * count < context.num_experts:
        raise UserError(
            f"capacity {capacity}: {count} groups hold {capacity * count} experts at most, layer "
            f"{context.index} has {context.num_experts}; give at least "
            f"{-(-context.num_experts // count)}."
        )
    distance = distances(context, feature)
    groups = [[leader] for leader in context.order[:count]]
    for expert in context.order[count:]:
        open_ = [g for g in groups if not capacity or len(g) < capacity]
        min(open_, key=lambda group: distance[group[0], expert]).append(expert)
    return Groups(groups)


@register(
    KIND,
    "frequency",
    title="The most important experts lead; the others are dealt out, most important first",
    needs=("data",),
    limits="A baseline: nothing is compared, groups only carry like loads.",
)
def frequency(context: LayerContext, count: int) -> Groups:
    """Form `count` groups; the next expert always joins the group of least importance so far."""
    groups = [[leader] for leader in context.order[:count]]
    held = [float(context.importance[leader]) for leader in context.order[:count]]
    for expert in context.order[count:]:
        least = int(np.argmin(held))
        groups[least].append(expert)
        held[least] += float(context.importance[expert])
    return Groups(groups)


@register(
    KIND,
    "random",
    title="Random leaders and random followers: what any grouping must beat",
    options={},
)
def random(context: LayerContext, count: int) -> Groups:
    """Form `count` groups, none empty, keyed by (seed, layer)."""
    source = np.random.default_rng(derive_seed(context.seed, "random-grouping", context.index))
    order = source.permutation(context.num_experts).tolist()
    groups = [[leader] for leader in order[:count]]
    for expert in order[count:]:
        groups[int(source.integers(count))].append(expert)
    return Groups(groups)


@register(
    KIND,
    "drop",
    title="The most important experts stay alone; the others belong to no group",
    needs=("data",),
    limits="With a linear fuser this is pruning; `recombine` still reads the experts left out.",
)
def drop(context: LayerContext, count: int) -> Groups:
    """Keep `count` experts."""
    return Groups([[e] for e in context.order[:count]], sorted(context.order[count:]))
