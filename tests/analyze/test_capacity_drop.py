import numpy as np
import pytest

from moekit.analyze.capacity_drop import capacity_drop

from .traces import make_trace, random_ids


def test_one_hot_expert_drops_all_after_its_capacity():
    """16 tokens on one of 4 experts: capacity 4, so the first quarter stays and no other."""
    trace = make_trace(np.zeros((32, 1, 1), dtype=int), 4, lengths=[16, 16], domains=["a", "b"])
    result = capacity_drop(trace, capacity_factor=1.0)
    assert result.rows[0][1:6] == (0.75, 0, 1, 1, 1)
    assert result.summary["rise"] == 1
    # The order of equal choices makes no difference.
    assert result.summary["drift"] == 0
    assert result.detail["by_domain"]["b"].tolist() == [0, 1, 1, 1]


def test_balanced_routing_drops_nothing():
    trace = make_trace((np.arange(64) % 4)[:, None], 4, lengths=[32, 32])
    result = capacity_drop(trace, capacity_factor=1.0)
    assert result.rows[0][1:] == (0, 0, 0, 0, 0, 0, 0)


def test_routing_that_narrows_towards_the_end_drifts():
    """The first half of each sequence uses 8 experts, the second half one."""
    length, samples = 128, 20
    place = np.arange(length * samples) % length
    preference = np.zeros((length * samples, 1, 8))
    preference[place >= length // 2, 0, 0] = 50
    narrowing = random_ids(length * samples, 8, 1, preference=preference)
    lengths = [length] * samples
    assert capacity_drop(make_trace(narrowing, 8, lengths=lengths)).summary["drift"] > 0.2
    # The same imbalance throughout drops as much in any order.
    skewed = random_ids(length * samples, 8, 1, preference=np.array([2, 0, 0, 0, 0, 0, 0, 0]))
    found = capacity_drop(make_trace(skewed, 8, lengths=lengths)).summary
    assert found["rise"] > 0.1
    assert found["drift"] == pytest.approx(0, abs=0.03)


def test_double_loop_agrees():
    ids = random_ids(50, 6, 2, preference=np.linspace(0, 1.5, 6))
    found = capacity_drop(make_trace(ids, 6), capacity_factor=0.9).rows[0][1]
    slots, taken, dropped = int(np.ceil(0.9 * 100 / 6)), [0] * 6, 0
    for token in ids[:, 0]:
        for expert in token:
            taken[expert] += 1
            dropped += taken[expert] > slots
    assert found == pytest.approx(dropped / 100)
