"""SRP and SCH, against the paper's definitions, the golden table and known routers."""

import numpy as np
import pytest

from moekit.analyze.segment_cache import sch
from moekit.analyze.segment_routing import srp
from moekit.core.errors import UserError

from .traces import make_trace, random_ids, sticky_ids


def golden_trace():
    rng = np.random.default_rng(0)
    return make_trace(np.array([rng.choice(8, 2, replace=False) for _ in range(1500)]), 8)


def test_sch_golden_table():
    ratios = ",".join(str(slots / 2) for slots in range(1, 9))
    result = sch(golden_trace(), windows="4,16", ratios=ratios, piece=1500)
    expected = {
        "m=4": [0.1203, 0.3507, 0.5310, 0.6753, 0.7777, 0.8563, 0.9323, 1],
        "m=16": [0.1203, 0.3157, 0.4803, 0.6140, 0.7310, 0.8337, 0.9243, 1],
        "belady": [0.1203, 0.3703, 0.5573, 0.6927, 0.7977, 0.8807, 0.9477, 1],
    }
    assert result.column("slots") == list(range(1, 9))
    for name, values in expected.items():
        # The table has four places.
        np.testing.assert_allclose(result.column(name), values, atol=5.1e-5)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (random_ids(4000, 8, 2), [0.564, 0.453, 0.410]),
        (sticky_ids(4000, 8, 2, keep=0.95), [0.966, 0.879, 0.694]),
    ],
)
def test_srp_of_known_routers(ids, expected):
    result = srp(make_trace(ids, 8), segments="4,16,64")
    # One draw of 4000 tokens; that of the expected values was another.
    np.testing.assert_allclose(result.rows[0][1:4], expected, atol=0.02)


def test_srp_by_its_definition():
    ids, m = random_ids(60, 5, 2, layers=2, seed=3), 6
    result = srp(make_trace(ids, 5, lengths=[40, 20]), segments=str(m))
    for layer in range(2):
        hot = (ids[:, layer, :, None] == np.arange(5)).any(1)
        counts = [hot[i : i + m].sum(0) for i in [*range(40 - m + 1), *range(40, 60 - m + 1)]]
        counts = np.array(counts).ravel()
        scores = []
        for a in range(m + 1):
            taken = counts >= a
            scores.append(2 * counts[taken].sum() / (m * taken.sum() + counts.sum()))
        assert result.rows[layer][1] == pytest.approx(max(scores))


def test_srp_is_1_for_a_constant_router_and_for_single_tokens():
    constant = np.tile([1, 3], (50, 1))
    result = srp(make_trace(constant, 4), segments="1,16")
    assert result.rows[0][1:4] == (1, 1, 1)
    assert srp(make_trace(random_ids(50, 8, 2), 8), segments="1").rows[0][1] == 1


def test_srp_interval_holds_the_truth_and_random_routing_is_at_its_floor():
    ids = random_ids(8000, 8, 2)
    summary = srp(make_trace(ids, 8, lengths=[100] * 80), segments="64").summary
    low, high = summary["interval_64"]
    assert low < summary["srp_64"] < high
    assert high - low < 0.02
    # Whole-segment choice cannot help a router without memory: floor 2K / (E + K).
    assert summary["srp_64"] == pytest.approx(0.4, abs=0.03)


def test_segments_longer_than_the_text_are_refused():
    with pytest.raises(UserError, match="longest sample read has 10 tokens"):
        srp(make_trace(random_ids(10, 4, 2), 4), segments="16")
    with pytest.raises(UserError, match="leaves no slot"):
        sch(make_trace(random_ids(10, 4, 2), 4), ratios="0.1")
