"""What is worth reading ahead, and what it does to time and bytes in virtual time."""

import numpy as np
import pytest

from moekit.core.cache_score import CacheScore, policy
from moekit.core.errors import UserError
from moekit.core.replay import accesses, replay
from moekit.runtime.predict import prefetch
from moekit.runtime.predict.calibration import UNKNOWN, Calibration, bins_of
from moekit.runtime.predict.predictor import REACH, Predictor
from moekit.runtime.predict.prefetch import Prefetcher
from moekit.runtime.predict.random import RandomExperts
from moekit.runtime.predict.recorded import Recording
from moekit.runtime.predict.timeline import play

from .routing import make_trace, random_ids, sticky_ids

EXPERTS, WIDTH, LAYERS = 16, 2, 4
SIZE = 1000
CELLS = LAYERS * EXPERTS


class Oracle(Predictor):
    """Knows the recording."""

    def __init__(self, recording):
        self.recording, self.row = recording, -1

    def begin(self, tokens=None):
        super().begin(tokens)
        if tokens is not None:
            self.row = int(self.tokens[0])

    def predict(self, layer, ahead):
        scores = np.zeros(self.num_experts, dtype=np.float32)
        scores[self.recording.ids[layer + ahead][self.row]] = 1
        return scores


def recording(keep=0.7, steps=400):
    # Token ids are row numbers, so that the oracle knows where it is.
    ids = sticky_ids(steps, EXPERTS, WIDTH, LAYERS, keep)
    return Recording.of(make_trace(ids, EXPERTS, lengths=[steps // 2] * 2))


def prefetcher(predictor, read_seconds=0.5, **options):
    return Prefetcher(
        predictor,
        num_experts=EXPERTS,
        top_k=WIDTH,
        expert_bytes=[SIZE] * LAYERS,
        bandwidth=SIZE / read_seconds,
        layer_seconds=1.0,
        **options,
    )


def run(held, ahead, slots=CELLS // 3, read_seconds=0.5, score="lru"):
    settings = {"layer_seconds": 1.0, "read_seconds": read_seconds}
    return play(held, ahead, slots=slots, score=policy(score), **settings)


@pytest.mark.parametrize("score", ["lru", "lfu", "lfu-aged"])
@pytest.mark.parametrize("slots", [CELLS // 8, CELLS // 3, CELLS])
def test_without_prefetch_the_misses_are_those_of_the_simulator(score, slots):
    trace = make_trace(sticky_ids(300, EXPERTS, WIDTH, LAYERS, 0.7), EXPERTS)
    ids, cells = accesses(trace, shared=True)
    # The timeline uses the experts of a token in order of their numbers, and ties go by order.
    ids = np.sort(ids, axis=2)
    expected = replay(ids, cells, policy(score), [slots], layers=LAYERS, hold=True)
    found = run(Recording.of(trace), None, slots, score=score)
    assert found.demand_reads == expected.misses.sum()
    assert found.accesses == expected.accesses.sum()


def test_time_without_prefetch_by_hand():
    """Two layers, one expert each; a read takes 3, computing 1, and a resident expert no read."""
    held = Recording.of(make_trace(np.array([[[0], [1]], [[0], [2]], [[0], [1]]]), 4))
    found = play(held, None, slots=8, score=CacheScore(), layer_seconds=1.0, read_seconds=3.0)
    assert (found.demand_reads, found.seconds) == (3, 3 + 3 + 1 + 3 + 1 + 1)
    assert found.compute_seconds == 6


def test_an_oracle_saves_time_and_wastes_nothing():
    held = recording()
    without = run(held, None, read_seconds=1.0)
    ahead = prefetcher(Oracle(held), 1.0)
    found = run(held, ahead, read_seconds=1.0)
    assert found.prefetch_reads > 0.4 * found.reads
    assert found.reads <= without.reads
    assert ahead.stats.wasted == 0
    bound = max(found.compute_seconds, found.reads * 1.0)
    assert bound <= found.seconds < 0.95 * without.seconds


@pytest.mark.parametrize("read_seconds", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("slots", [CELLS // 6, CELLS // 2])
def test_a_useless_predictor_costs_at_most_the_limit(read_seconds, slots):
    held = recording()
    without = run(held, None, slots, read_seconds)
    ahead = prefetcher(RandomExperts(), read_seconds)
    found = run(held, ahead, slots, read_seconds)
    # The limit; and no slower than one read in the way of a tenth of the layers.
    assert found.reads <= 1.3 * without.reads
    assert found.seconds <= 1.1 * without.seconds


def test_without_an_allowance_nothing_uncertain_is_read():
    held = recording()
    assert run(held, prefetcher(RandomExperts(), waste_limit=0.0)).prefetch_reads == 0


def test_random_routing_is_left_alone_where_reads_are_slow():
    held = Recording.of(make_trace(random_ids(400, EXPERTS, WIDTH, LAYERS), EXPERTS))
    found = run(held, prefetcher(RandomExperts(), 2.0), read_seconds=2.0)
    # Bins that few scores fall into may look good for a while.
    assert found.prefetch_reads < 0.01 * found.demand_reads


def taught(budget=None, layer_seconds=1.0):
    """A prefetcher of an oracle that always predicts experts 0 and 1, and has been right."""
    held = Recording.of(make_trace(np.tile([0, 1], (60, LAYERS, 1)), EXPERTS))
    ahead = prefetcher(Oracle(held), 0.1, budget=budget)
    nothing = np.zeros((LAYERS, EXPERTS))
    for row in range(50):
        ahead.begin([row], nothing)
        for layer in range(LAYERS):
            ahead.observe(layer, [[0, 1]], None, nothing)
    ahead.layer_seconds = layer_seconds
    ahead.begin([51], nothing)
    return ahead, nothing


def test_hints_name_absent_experts_of_the_layers_to_come():
    ahead, resident = taught()
    resident[2, 0] = 1
    hints = ahead.observe(0, [[0, 1]], None, resident)
    # Expert 0 of layer 2 is in memory, and named first, to stay.
    assert [hint.layer for hint in hints] == [1, 2, 3]
    assert [sorted(hint.ids) for hint in hints] == [[0, 1]] * 3
    assert hints[1].ids == [0, 1]
    assert ahead.observe(3, [[0, 1]], None, resident) == []


def test_a_new_hint_takes_back_what_is_not_expected_any_more():
    ahead, resident = taught()
    first = ahead.observe(0, [[0, 1]], None, resident)
    ahead.predictor.predict = lambda layer, n: np.zeros(EXPERTS, dtype=np.float32)
    second = ahead.observe(1, [[0, 1]], None, resident)
    assert first[1].layer == second[0].layer == 2
    assert len(first[1].ids) == 2
    assert second[0].ids == []


def test_budget_and_time_bound_the_hints():
    ahead, resident = taught(budget=3 * SIZE)
    hints = ahead.observe(0, [[0, 1]], None, resident)
    assert sum(len(hint.ids) for hint in hints) == 3
    ahead, resident = taught(layer_seconds=0.0)
    assert not any(hint.ids for hint in ahead.observe(0, [[0, 1]], None, resident))


def test_stats_tell_useful_from_wasted_and_late_from_dropped():
    ahead, resident = taught()
    before = (ahead.stats.useful, ahead.stats.wasted)
    ahead.observe(0, [[0, 1]], None, resident)
    resident[1, 0] = resident[2, 0] = 1
    ahead.observe(1, [[0, 3]], None, resident)
    ahead.observe(2, [[4, 5]], None, resident)
    assert (ahead.stats.useful, ahead.stats.wasted) == (before[0] + SIZE, before[1] + SIZE)
    # Expert 1 of layer 2 came too late to be seen when its layer ran, and was wasted as well.
    resident[2, 1] = 1
    ahead.begin([52], resident)
    ahead.observe(2, [[4, 5]], None, resident)
    assert ahead.stats.wasted == before[1] + 2 * SIZE


class Counting(RandomExperts):
    """Knows nothing, and counts how often it is asked."""

    asked = 0

    def predict(self, layer, ahead):
        self.asked += 1
        return super().predict(layer, ahead)


def test_a_predictor_that_knows_nothing_is_asked_less_and_less():
    ids = random_ids(640, EXPERTS, WIDTH, LAYERS)
    held = Recording.of(make_trace(ids, EXPERTS, lengths=[640]))
    counting = Counting(seed=0)
    # Reads far longer than layers: nothing uncertain is worth one.
    run(held, prefetcher(counting, 4.0), read_seconds=4.0)
    always = 640 * sum(min(3, LAYERS - 1 - layer) for layer in range(-1, LAYERS - 1))
    assert counting.asked < 0.2 * always


def test_it_is_asked_again_when_it_knows_something(monkeypatch):
    held = recording(steps=1200)
    ids = np.array(held.ids)
    ids[:, :600] = random_ids(600, EXPERTS, WIDTH, LAYERS).transpose(1, 0, 2)
    held = Recording.of(make_trace(ids.transpose(1, 0, 2), EXPERTS, lengths=[1200]))

    class Late(Oracle):
        def predict(self, layer, ahead):
            known = super().predict(layer, ahead)
            return known if self.row >= 600 else np.zeros_like(known)

    useful = []
    for patience in (prefetch.PATIENCE, 10**9):
        monkeypatch.setattr(prefetch, "PATIENCE", patience)
        late = prefetcher(Late(held))
        run(held, late)
        useful.append(late.stats.useful)
    assert useful[0] > 0.8 * useful[1]


def test_predicting_that_costs_more_than_it_gains_rests():
    held = recording(steps=1200)
    rests = {}
    for cost in (0.0, 100.0):
        ahead = prefetcher(Oracle(held))
        ahead.prediction_seconds = cost
        asked = []
        ahead.predictor.predict = lambda layer, n, o=ahead.predictor, a=asked: (
            a.append(layer) or Oracle.predict(o, layer, n)
        )
        run(held, ahead)
        rests[cost] = len(asked)
    # One pass in 16, and those before it gives up.
    assert 0 < rests[100.0] < 0.1 * rests[0.0]


def seen(scores, ahead):
    """Bins of scores that were given `ahead` layers earlier, as `Calibration.learn` takes them."""
    bins = np.full((REACH, len(scores)), UNKNOWN)
    bins[ahead - 1] = bins_of(np.array(scores, dtype=np.float32))
    return bins


def test_calibration_learns_what_scores_are_worth():
    random = np.random.default_rng(0)
    calibration = Calibration(3, base=0.1)
    bins = seen([0.9, 0.5, 0.01], 2)
    both = bins[[1, 1]]
    assert calibration.probabilities(0, [1, 2], both) == pytest.approx(np.full((2, 3), 0.1))
    for _ in range(20000):
        calibration.learn(2, bins, random.random(3) < [0.7, 0.2, 0.02])
    one, two = calibration.probabilities(0, [1, 2], both)
    # Half of 4,096 observations: a standard error below 0.011.
    assert two == pytest.approx([0.7, 0.2, 0.02], abs=0.045)
    assert one == pytest.approx(np.full(3, 0.1))
    # Layer 2 is not layer 1, and one ahead of it is not two.
    assert calibration.probabilities(1, [1], both[:1]) == pytest.approx(np.full((1, 3), 0.1))
    assert calibration.probabilities(-1, [2], both[:1]) == pytest.approx(np.full((1, 3), 0.1))


def test_every_score_has_a_bin_and_higher_ones_none_below():
    scores = np.concatenate([[0.0], np.geomspace(1e-9, 0.5, 50), [0.75, 1 - 1e-7, 1.0]])
    bins = bins_of(scores.astype(np.float32))
    assert (np.diff(bins) >= 0).all()
    assert (bins[0], bins[-1]) == (0, 23)


def test_a_layer_that_is_in_memory_is_not_predicted():
    ahead, resident = taught()
    resident[1:3] = 1
    ahead.predictor.predict = lambda layer, n: (
        pytest.fail("asked") if layer + n < 3 else np.ones(EXPERTS)
    )
    assert [hint.layer for hint in ahead.observe(0, [[0, 1]], None, resident)] == [3]


def test_calibration_follows_a_change():
    calibration = Calibration(1, base=0.5)
    bins = seen([0.9], 1)
    for used in (True, False):
        for _ in range(20000):
            calibration.learn(0, bins, np.array([used]))
    assert calibration.probabilities(-1, [1], bins[:1])[0, 0] < 0.05


def test_impossible_settings_are_refused():
    held = recording(steps=20)
    with pytest.raises(UserError, match="bandwidth 0"):
        Prefetcher(
            RandomExperts(),
            num_experts=4,
            top_k=1,
            expert_bytes=[1],
            bandwidth=0,
            layer_seconds=1,
        )
    with pytest.raises(UserError, match="1 slots cannot hold the 2 experts"):
        run(held, None, slots=1)
    with pytest.raises(UserError, match="learns from the past"):
        run(held, None, score="belady")
