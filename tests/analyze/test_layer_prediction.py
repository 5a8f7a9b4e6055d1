import numpy as np
import pytest

from moekit.analyze.layer_prediction import layer_prediction
from moekit.core.errors import UserError

from .traces import make_trace, random_ids


def test_a_layer_that_follows_the_one_before_is_predicted():
    """Layer 1 is layer 0 with the experts renamed; layer 2 has nothing to do with it."""
    first = random_ids(4000, 8, 2)[:, 0]
    renamed = np.random.default_rng(1).permutation(8)[first]
    ids = np.stack([first, renamed, random_ids(4000, 8, 2, seed=9)[:, 0]], axis=1)
    result = layer_prediction(make_trace(ids, 8, lengths=[100] * 40))
    assert result.column("recall")[0] == 1
    assert result.column("bits")[0] > 0.2
    assert result.column("recall")[1] == pytest.approx(result.column("popular")[1], abs=0.03)
    assert result.column("bits")[1] == pytest.approx(result.column("chance")[1], abs=0.01)


def test_entropy_of_a_one_to_one_transition():
    first = random_ids(2000, 4, 1)[:, 0]
    result = layer_prediction(make_trace(np.stack([first, 3 - first], axis=1), 4))
    assert result.column("entropy")[0] == pytest.approx(0, abs=1e-9)
    assert result.column("marginal")[0] == pytest.approx(2, abs=0.01)
    assert result.column("bits")[0] == pytest.approx(result.column("marginal")[0])


def test_popularity_is_no_prediction():
    """Skewed but independent layers: the table finds no more than the popular experts."""
    ids = random_ids(6000, 8, 2, layers=2, preference=np.linspace(0, 3, 8))
    result = layer_prediction(make_trace(ids, 8, lengths=[100] * 60))
    assert result.column("popular")[0] > 0.5
    assert result.column("recall")[0] == pytest.approx(result.column("popular")[0], abs=0.02)


def test_one_layer_and_one_token_are_refused():
    with pytest.raises(UserError, match="one MoE layer"):
        layer_prediction(make_trace(random_ids(20, 4, 1), 4))
    with pytest.raises(UserError, match="1 tokens are too few"):
        layer_prediction(make_trace(random_ids(1, 4, 1, layers=2), 4))
