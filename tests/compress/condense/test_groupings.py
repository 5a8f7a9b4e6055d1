"""Every grouping is a partition, finds planted groups, and does not depend on numbering."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekit.compress.condense.context import LayerContext
from moekit.compress.condense.features import FEATURES, distances
from moekit.core.errors import UserError
from moekit.core.registry import registry
from tests.compress.condense.planted import TOKENS, context_of, noisy, random_expert

NAMES = [method.name for method in registry.methods(kind="grouping")]
PROTOTYPES = 3
# Copies interleaved, so that neither neighbours nor importance give the groups away.
KIND_OF = [0, 1, 2, 0, 1, 2, 2, 1, 0, 0]


def planted(order: list[int] | None = None) -> LayerContext:
    prototypes = [random_expert(seed) for seed in range(PROTOTYPES)]
    columns = torch.randn(TOKENS, PROTOTYPES, generator=torch.Generator().manual_seed(5))
    kinds = KIND_OF if order is None else [KIND_OF[e] for e in order]
    names = range(len(KIND_OF)) if order is None else order
    experts = [
        noisy(prototypes[kind], 0.01, 100 + name) for kind, name in zip(kinds, names, strict=True)
    ]
    noise = torch.randn(TOKENS, len(KIND_OF), generator=torch.Generator().manual_seed(6))
    logits = columns[:, kinds] + 0.05 * noise[:, list(names)]
    importance = torch.tensor([float(100 - n) for n in names]).double()
    return context_of(experts, logits, importance)


def as_sets(groups: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def wanted(kinds: list[int]) -> set[frozenset[int]]:
    return {
        frozenset(e for e, kind in enumerate(kinds) if kind == which) for which in range(PROTOTYPES)
    }


def call(name: str, context: LayerContext, count: int, **options: Any) -> Any:
    found = registry.find(name, kind="grouping").load()(context, count, **options)
    found.check(context, count)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 5, 9, 10])
def test_every_grouping_is_a_partition_of_the_right_size(name: str, count: int) -> None:
    found = call(name, planted(), count)
    assert all(found.groups)
    if count == len(KIND_OF):
        assert not found.dropped
        assert as_sets(found.groups) == {frozenset([e]) for e in range(count)}


FINDERS = [("dominant", {"feature": feature}) for feature in FEATURES] + [
    ("hierarchical", {"feature": feature}) for feature in FEATURES
]
FINDERS += [("hierarchical", {"linkage": linkage}) for linkage in ("single", "complete")]
FINDERS += [("spectral", {"feature": feature}) for feature in FEATURES]
FINDERS += [("segments", {})]


@pytest.mark.parametrize(("name", "options"), FINDERS)
def test_prototypes_are_recovered(name: str, options: dict[str, Any]) -> None:
    assert as_sets(call(name, planted(), PROTOTYPES, **options).groups) == wanted(KIND_OF)


# Not "weights": the neurons are lined up with those of expert 0.
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "weights"])
@pytest.mark.parametrize("name", ["dominant", "hierarchical", "spectral"])
def test_groups_do_not_depend_on_numbering(name: str, feature: str) -> None:
    order = [7, 2, 9, 4, 0, 5, 1, 8, 3, 6]
    found = call(name, planted(order), 4, feature=feature)
    first = call(name, planted(), 4, feature=feature)
    assert as_sets([[order[e] for e in group] for group in found.groups]) == as_sets(first.groups)


def test_leaders_are_the_most_important() -> None:
    context = planted()
    for name in ("dominant", "frequency", "drop", "segments"):
        assert [group[0] for group in call(name, context, 4).groups] == context.order[:4]


def test_frequency_deals_equal_loads() -> None:
    context = context_of([random_expert(n) for n in range(6)], importance=torch.ones(6).double())
    assert sorted(len(group) for group in call("frequency", context, 3).groups) == [2, 2, 2]


def test_random_depends_on_the_seed_alone() -> None:
    experts = [random_expert(n) for n in range(8)]
    one, again, other = (
        call("random", context_of(experts, seed=seed), 3).groups for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_capacity_limits_groups_and_is_checked() -> None:
    found = call("dominant", planted(), 5, capacity=2)
    assert [len(group) for group in found.groups] == [2] * 5
    with pytest.raises(UserError, match="at least 4"):
        call("dominant", planted(), 3, capacity=3)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"no feature.*mean-output"):
        distances(planted(), "taste")
    with pytest.raises(UserError, match=r"no linkage.*average"):
        call("hierarchical", planted(), 3, linkage="farthest")


def test_twins_in_other_neuron_order_are_at_no_distance() -> None:
    """Weights are compared neuron by neuron, whatever order they come in."""
    first = random_expert(0)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    twin = type(first)(first.gate[shuffle], first.up[shuffle], first.down[:, shuffle])
    context = context_of([first, random_expert(1), twin])
    assert distances(context, "weights")[0, 2] == 0
    assert distances(context, "weights")[0, 1] > 1


def test_segments_without_a_like_go_nowhere() -> None:
    context = context_of([random_expert(n) for n in range(4)])
    assert call("segments", context, 2, tau=0.999).dropped == [2, 3]
