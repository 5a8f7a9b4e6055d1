import numpy as np
import pytest

from moekit.analyze.cache_curve import cache_curve
from moekit.analyze.reuse_distance import reuse_distance
from moekit.core.errors import UserError

from .traces import make_trace, random_ids, sticky_ids


def test_a_router_that_keeps_its_experts_needs_only_their_slots():
    """One set of experts for a sample; the cold start of 2 in 400 accesses is all that misses."""
    ids = np.tile([1, 5], (400, 1))
    result = cache_curve(make_trace(ids, 8), piece=200)
    assert result.rows[0][:3] == (2, 1, 0.25)
    for name in ("lru", "lfu", "lfu-aged", "belady"):
        assert result.column(name)[0] == pytest.approx(398 / 400)
    # The hot set is inside from the start.
    assert result.column("hot-set")[0] == 1


def test_uniform_routing_makes_every_cache_look_useless():
    ids = random_ids(4000, 16, 1, layers=2)
    result = cache_curve(make_trace(ids, 16, lengths=[200] * 20))
    for name in ("lru", "lfu", "lfu-aged", "hot-set"):
        np.testing.assert_allclose(result.column(name), result.column("uniform"), atol=0.04)
    assert result.column("belady")[3] > result.column("lru")[3] + 0.1


def test_order_of_the_policies_and_a_full_cache():
    ids = random_ids(1200, 16, 2, layers=2, preference=np.linspace(0, 3, 16))
    for shared in (False, True):
        result = cache_curve(make_trace(ids, 16, lengths=[100] * 12), shared=shared)
        best = np.array(result.column("belady"))
        for name in ("lru", "lfu", "lfu-aged"):
            assert (np.array(result.column(name)) <= best + 1e-12).all()
        assert (np.diff(best) >= 0).all()
        assert result.column("uniform")[-1] == 1
        # Everything fits: only the 32 first uses miss.
        assert best[-1] == pytest.approx(1 - 32 / (600 * 4), abs=0.005)


def test_one_token_is_refused():
    with pytest.raises(UserError, match="one token is too little"):
        cache_curve(make_trace(np.array([[0, 1]]), 4))


def test_reuse_distance_of_a_cycle():
    """Experts in turn: every one comes back after all 5 others."""
    result = reuse_distance(make_trace((np.arange(600) % 6)[:, None], 6))
    assert result.detail["histogram"][0].tolist() == [0, 0, 0, 0, 0, 594, 6]
    assert result.rows[0][1:4] == (5, 5, 0)
    assert result.summary["locality"] < -0.2


def test_locality_is_found_and_random_order_has_none():
    sticky = reuse_distance(make_trace(sticky_ids(3000, 16, 2, keep=0.95), 16))
    assert sticky.summary["locality"] > 0.4
    random = reuse_distance(make_trace(random_ids(3000, 16, 2), 16))
    assert abs(random.summary["locality"]) < 0.03
