from __future__ import annotations

import itertools

import pytest
import torch

from moekit.compress.prune.select import Room, spread
from moekit.core.errors import UserError


def test_the_best_stay_and_the_protected_among_them():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert Room(0, 6, 3).best(scores) == [0, 2, 4]
    assert Room(0, 6, 3, protected=frozenset({5})).best(scores) == [0, 2, 5]
    assert Room(0, 6, 4, num_groups=2).best(scores) == [0, 2, 3, 4]
    assert Room(0, 6, 6).best(scores) == list(range(6))


def test_ties_go_to_the_lower_id():
    assert Room(0, 4, 2).best(torch.zeros(4)) == [0, 1]


@pytest.mark.parametrize(
    "room",
    [
        Room(0, 6, 3),
        Room(0, 6, 3, protected=frozenset({1, 4})),
        Room(0, 8, 4, num_groups=2),
        Room(0, 8, 4, num_groups=2, protected=frozenset({7})),
        Room(0, 4, 4),
    ],
)
def test_every_subset_by_brute_force(room):
    expected = [
        list(keep)
        for keep in itertools.combinations(range(room.num_experts), room.count)
        if room.protected <= set(keep)
        and all(len(set(keep) & set(g)) == room.per_group for g in room.groups())
    ]
    assert sorted(room.every_subset()) == expected
    assert room.subsets() == len(expected)


def test_removing_and_exchanging_stay_within_the_room():
    room = Room(0, 8, 4, num_groups=2, protected=frozenset({0}))
    assert room.removable(range(8)) == list(range(1, 8))
    assert room.removable([0, 1, 4, 5, 6]) == [4, 5, 6]
    subsets = list(room.every_subset())
    for keep in room.exchanges([0, 1, 4, 5]):
        assert keep in subsets
    assert len(list(room.exchanges([0, 1, 4, 5]))) == 2 + 4


def test_one_threshold_over_layers():
    # Shares of layer 0: 0.4 0.3 0.2 0.1; of layer 1: 0.97 and three of 0.01. The threshold takes
    # the three of layer 1 first, but its router chooses two.
    rooms = [Room(0, 4, 2), Room(1, 4, 2)]
    scores = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([97.0, 1.0, 1.0, 1.0])]
    assert [room.count for room in spread(rooms, scores, [1, 1])] == [3, 1]
    assert [room.count for room in spread(rooms, scores, [2, 2])] == [2, 2]


def test_protection_bounds_a_layer():
    rooms = [Room(0, 4, 2), Room(1, 4, 2, protected=frozenset({1, 2}))]
    scores = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([97.0, 1.0, 1.0, 1.0])]
    # Only one cheap expert of layer 1 may go.
    assert [room.count for room in spread(rooms, scores, [1, 1])] == [1, 3]
    assert [room.count for room in spread(rooms, scores, [2, 2])] == [2, 2]


def test_groups_lose_experts_together():
    rooms = [Room(0, 8, 6, num_groups=2), Room(1, 8, 6, num_groups=2)]
    scores = [torch.arange(1.0, 9.0), torch.ones(8)]
    # Layer 0 costs (1 + 5) / 72 for its first pair, layer 1 (1 + 1) / 16.
    assert [room.count for room in spread(rooms, scores, [2, 2])] == [4, 8]


def test_refusals():
    with pytest.raises(UserError, match="3 experts are protected, but only 2 of 4"):
        Room(3, 4, 2, protected=frozenset({0, 1, 2}))
    with pytest.raises(UserError, match="2 experts are protected in group 1, but only 1 of 4"):
        Room(3, 8, 2, num_groups=2, protected=frozenset({4, 5}))
    with pytest.raises(UserError, match="6 experts are to go, but only 4 can"):
        spread([Room(0, 4, 1), Room(1, 4, 1)], [torch.ones(4), torch.ones(4)], [2, 2])
