import numpy as np
import pytest

from moekit.analyze.load import load
from moekit.core.errors import UserError

from .traces import make_trace, random_ids


def test_known_load():
    """Layer 0 uses one expert of four; layer 1 all alike."""
    steps = 40
    ids = np.stack([np.full(steps, 2), np.arange(steps) % 4], axis=1)[:, :, None]
    weights = np.full((steps, 2, 1), 0.5)
    for chunk in (None, 7):
        result = load(make_trace(ids, 4, weights=weights, chunk=chunk))
        assert result.column("imbalance") == [4, 1]
        assert result.column("dead") == [3, 0]
        assert result.column("entropy") == pytest.approx([0, 1])
        assert result.column("effective") == pytest.approx([1, 4])
        assert result.detail["gate_mass"][0].tolist() == [0, 0, steps / 2, 0]
        assert "3 experts were never chosen in 40 tokens" in result.notes


def test_uniform_routing_is_even():
    result = load(make_trace(random_ids(8000, 8, 2), 8))
    # 2000 choices an expert: 5 standard deviations are 0.1 of the mean.
    assert result.column("imbalance")[0] == pytest.approx(1, abs=0.1)
    assert result.column("entropy")[0] > 0.999
    assert result.summary["dead_experts"] == 0


def test_tokens_with_fewer_experts_count_less():
    ids = np.array([[0, -1], [0, 1], [1, -1]])
    result = load(make_trace(ids, 2))
    assert result.detail["counts"][0].tolist() == [2, 2]


def test_nothing_to_count_is_refused():
    with pytest.raises(UserError, match="trace is empty"):
        load(make_trace(np.empty((0, 1, 2), dtype=int), 4))
    with pytest.raises(UserError, match="no expert was chosen in any layer in the 5 tokens"):
        load(make_trace(np.full((5, 2, 2), -1), 4))
