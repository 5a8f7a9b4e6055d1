"""Expert caches in simulation: the paper's golden table, brute force, and plain re-tellings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moekit.core.cache_score import CacheScore, ScoreState, policy
from moekit.core.errors import UserError
from moekit.core.replay import replay, stack_distances

ONLINE = ("lru", "lfu", "lfu-aged")


def routing(steps, num_experts, width, streams=1, seed=0, skew=0.0):
    """Distinct experts per token, drawn by exponents of `skew`."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(steps, streams, num_experts)) - skew * np.log1p(np.arange(num_experts))
    return np.argsort(-noise, axis=-1)[..., :width]


@pytest.fixture(scope="module")
def golden():
    rng = np.random.default_rng(0)
    return np.array([rng.choice(8, 2, replace=False) for _ in range(1500)])[:, None, :]


GOLDEN = [
    ({"future": "window", "window": 4}, [0.1203, 0.3507, 0.5310, 0.6753, 0.7777, 0.8563, 0.9323]),
    ({"future": "window", "window": 16}, [0.1203, 0.3157, 0.4803, 0.6140, 0.7310, 0.8337, 0.9243]),
    ({"future": "next use"}, [0.1203, 0.3703, 0.5573, 0.6927, 0.7977, 0.8807, 0.9477]),
]


@pytest.mark.parametrize(("settings", "expected"), GOLDEN)
def test_golden_table(golden, settings, expected):
    found = replay(golden, 8, CacheScore(**settings), range(1, 9), free_start=True).hit_rate
    # The table has four places.
    np.testing.assert_allclose(found, [*expected, 1.0], atol=5.1e-5)


def held_optimum(tokens, slots):
    """The most hits of any choice of victims among the experts that the token does not use."""
    best = {frozenset(): 0}
    for token in map(set, tokens):
        after: dict[frozenset, int] = {}
        for cache, hits in best.items():
            others = cache - token
            kept = min(len(others), slots - len(token))
            for rest in itertools.combinations(others, kept):
                state = frozenset(token.union(rest))
                after[state] = max(after.get(state, 0), hits + len(cache & token))
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("slots", "width"), [(2, 2), (3, 2), (4, 2), (2, 1), (1, 1), (4, 3)])
def test_belady_with_held_experts_is_the_optimum(seed, slots, width):
    ids = routing(14, 6, width, seed=seed, skew=0.5)
    found = replay(ids, 6, policy("belady"), [slots], hold=True).hits[0, 0]
    assert found == held_optimum(ids[:, 0].tolist(), slots)


def flat_optimum(accesses, slots):
    """The most hits when accesses come one at a time, by trying every victim."""
    best = {frozenset(): 0}
    for expert in accesses:
        after: dict[frozenset, int] = {}
        for cache, hits in best.items():
            if expert in cache:
                options = [(cache, hits + 1)]
            elif len(cache) < slots:
                options = [(cache | {expert}, hits)]
            else:
                options = [(cache - {victim} | {expert}, hits) for victim in cache]
            for state, value in options:
                after[state] = max(after.get(state, -1), value)
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("slots", "width"), [(2, 2), (3, 2), (5, 2), (3, 3), (1, 1)])
def test_belady_is_the_optimum_of_single_accesses(seed, slots, width):
    ids = routing(14, 6, width, seed=seed)
    found = replay(ids, 6, policy("belady"), [slots]).hits[0, 0]
    assert found == flat_optimum(ids.reshape(-1).tolist(), slots)


def worth(uses, now, score):
    """The score of an expert with these uses [(token, place)], from its definition."""
    if not score.frequency:
        return (0, uses[-1])
    if score.half_life is None:
        return (len(uses), uses[-1])
    return (sum(2.0 ** ((step - now) / score.half_life) for step, _ in uses), uses[-1])


def told_again(ids, slots, score, hold):
    """The hits of one cache, in plain loops."""
    inside, hits, uses = set(), 0, {}
    for step, token in enumerate(ids.tolist()):
        hits += len(inside & set(token))
        for place, expert in enumerate(token):
            uses.setdefault(expert, []).append((step, place))
            if expert not in inside and len(inside) == slots:
                scores = {e: worth(uses[e], step, score) for e in inside}
                held = set(token) if hold else set()
                inside.remove(min(inside - held, key=scores.__getitem__))
            inside.add(expert)
    return hits


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("name", ONLINE)
def test_policies_equal_their_definition(name, hold):
    ids = routing(300, 12, 3, seed=3, skew=0.7)
    for slots in (3, 5, 9):
        found = replay(ids, 12, policy(name), [slots], hold=hold).hits[0, 0]
        assert found == told_again(ids[:, 0], slots, policy(name), hold)


def test_streams_and_capacities_do_not_touch_each_other():
    ids = routing(200, 10, 2, streams=3, skew=0.8)
    for name in (*ONLINE, "belady"):
        together = replay(ids, 10, policy(name), [2, 6])
        for stream in range(3):
            for number, slots in enumerate([2, 6]):
                alone = replay(ids[:, stream : stream + 1], 10, policy(name), [slots])
                assert together.hits[number, stream] == alone.hits[0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_belady_is_above_every_policy(seed):
    ids = routing(400, 16, 2, streams=2, seed=seed, skew=0.6)
    capacities = [2, 4, 8, 12]
    best = replay(ids, 16, policy("belady"), capacities).hits
    profile = np.stack([np.bincount(ids[:, n].ravel(), minlength=16) for n in range(2)])
    for name in ONLINE:
        assert (replay(ids, 16, policy(name), capacities).hits <= best).all()
    for window in (4, 16):
        score = CacheScore(future="window", window=window)
        assert (replay(ids, 16, score, capacities).hits <= best).all()
    hot = replay(ids, 16, policy("hot-set"), [16], profile=profile)
    assert hot.hit_rate[0] == 1


def test_hot_set_hits_what_its_profile_holds():
    ids = routing(500, 8, 2, skew=1.0)
    counts = np.bincount(ids.ravel(), minlength=8)
    found = replay(ids, 8, policy("hot-set"), [2, 3, 5], profile=counts[None])
    expected = [np.sort(counts)[::-1][:slots].sum() for slots in (2, 3, 5)]
    assert found.hits[:, 0].tolist() == expected


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_hot_set_that_holds_gives_up_its_lowest_slots(slots):
    """In plain loops: what is passed through needs a slot, and leaves first."""
    ids = routing(500, 8, 2, skew=1.0)
    counts = np.bincount(ids.ravel(), minlength=8)
    inside, hits = set(np.argsort(-counts, kind="stable")[:slots].tolist()), 0
    for token in ids[:, 0].tolist():
        hits += len(inside & set(token))
        for expert in set(token) - inside:
            inside.remove(min(inside - set(token), key=lambda e: (counts[e], e)))
            inside.add(expert)
    found = replay(ids, 8, policy("hot-set"), [slots], profile=counts[None], hold=True)
    assert found.hits[0, 0] == hits


def test_a_profile_changes_nothing_for_the_scores_without_one():
    ids = routing(200, 8, 2, skew=0.5)
    for name in (*ONLINE, "belady"):
        bare, given = (
            replay(ids, 8, policy(name), [3, 5], profile=profile).hits
            for profile in (None, np.arange(8.0)[None])
        )
        assert bare.tolist() == given.tolist()


def shared_worth(score, uses, now, layer, layers, per_layer):
    """The score of expert e, from its definition, for those that see layers."""

    def worth(expert):
        own = expert // per_layer
        value = 0.0
        if score.half_life:
            value = sum(2.0 ** ((step - now) / score.half_life) for step, _ in uses[expert])
        if score.distance:
            value /= (own - layer - 1) % layers + 2
        first = own < math.ceil(score.shallow * layers)
        # Scores by count that are equal go by number.
        return (first, value, expert if score.frequency else uses[expert][-1])

    return worth


@pytest.mark.parametrize("name", ["shallow-first", "edgemoe", "auto", "lru"])
def test_shared_pools_equal_their_definition(name):
    layers, per_layer, score = 3, 6, policy(name)
    own = routing(200, per_layer, 2, streams=layers, seed=5, skew=0.6)
    ids = (own + np.arange(layers)[:, None] * per_layer).reshape(-1, 1, 2)
    for slots in (4, 7, 12):
        inside, hits, uses = set(), 0, {}
        for step, token in enumerate(ids[:, 0].tolist()):
            now, layer = divmod(step, layers)
            hits += len(inside & set(token))
            for place, expert in enumerate(token):
                uses.setdefault(expert, []).append((now, 2 * step + place))
            worth = shared_worth(score, uses, now, layer, layers, per_layer)
            for expert in token:
                if expert not in inside and len(inside) == slots:
                    inside.remove(min(inside - set(token), key=worth))
                inside.add(expert)
        found = replay(ids, layers * per_layer, score, [slots], hold=True, layers=layers)
        assert found.hits[0, 0] == hits


def test_minus_recent_score_is_the_moving_average_of_the_best_scores():
    rng = np.random.default_rng(4)
    scores = rng.random((300, 8))
    order = np.argsort(-scores, axis=1)
    near, ids = order[:, :4], order[:, :2]
    average, inside, hits = np.zeros(8), set(), 0
    for step in range(300):
        token = set(ids[step].tolist())
        top = np.zeros(8)
        top[near[step]] = scores[step, near[step]]
        average = 0.5 * top + 0.5 * average
        hits += len(inside & token)
        for expert in ids[step].tolist():
            if expert not in inside and len(inside) == 4:
                inside.remove(min(inside - token, key=average.__getitem__))
            inside.add(expert)
    gains = (near[:, None], np.take_along_axis(scores, near, axis=1)[:, None])
    found = replay(ids[:, None], 8, policy("mrs"), [4], hold=True, gains=gains)
    assert found.hits[0, 0] == hits


def test_a_refreshed_set_changes_only_at_its_refreshes():
    """Counts that doubled move their rank at the next refresh; steady ones keep theirs."""
    score = CacheScore(frequency=True, half_life=1e9, refresh=100, hysteresis=0.5)
    state = ScoreState(score, 1, 4)
    seen = []
    for step in range(1000):
        experts = np.array([[0, 1]]) if step < 500 else np.array([[2, 1]])
        state.use(step, experts)
        seen.append(state.keys[0, :4].copy())
    changes = [step for step in range(1, 1000) if (seen[step] != seen[step - 1]).any()]
    assert changes[:3] == [1, 3, 7]
    assert (np.diff(changes[7:]) == 100).all()
    assert seen[520][0] > seen[520][2]
    # 400 or 500 uses of expert 2 are within half of the 500 of the others.
    assert seen[-1][1] > seen[-1][0]
    assert seen[-1][2] > seen[520][2]


def test_stack_distances_give_lru_at_every_capacity(golden):
    for ids, num_experts in ((golden, 8), (routing(300, 20, 4, streams=5, skew=0.5), 20)):
        distance = stack_distances(ids, num_experts)
        capacities = range(1, num_experts + 1)
        lru = replay(ids, num_experts, policy("lru"), capacities).hits
        assert lru.tolist() == [(distance < c).sum((0, 2)).tolist() for c in capacities]


def test_missing_choices_are_no_accesses():
    ids = routing(100, 6, 2)
    padded = np.concatenate([ids, np.full((100, 1, 1), -1)], axis=2)
    for name in (*ONLINE, "belady"):
        bare, filled = (replay(x, 6, policy(name), [2, 3]) for x in (ids, padded))
        assert bare.hits.tolist() == filled.hits.tolist()
        assert filled.accesses.tolist() == [200]
    assert (stack_distances(padded, 6)[:, :, 2] == -1).all()


def test_no_policy_beats_the_share_of_slots_on_uniform_routing():
    ids = np.random.default_rng(1).integers(0, 16, size=(4000, 1, 1))
    for name in ONLINE:
        # Independent uniform choices: every cache of 4 of 16 slots hits a quarter.
        assert replay(ids, 16, policy(name), [4]).hit_rate[0] == pytest.approx(0.25, abs=0.03)


def test_the_state_of_a_score_follows_the_simulator():
    """What an engine asks for one token at a time is what the simulator used."""
    ids = routing(50, 6, 2, seed=2)
    state = ScoreState(policy("lfu"), 1, 6)
    for step in range(50):
        keys = state.use(step, ids[step])
    counts = [int((ids == e).sum()) for e in ids[-1, 0]]
    assert (keys[0] // 2.0**30).astype(int).tolist() == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacities": [0]}, "1 slot or more"),
        ({"capacities": [1], "hold": True}, "uses 2 experts together"),
    ],
)
def test_impossible_caches_are_refused(golden, arguments, message):
    with pytest.raises(UserError, match=message):
        replay(golden, 8, policy("lru"), **arguments)


def test_impossible_scores_are_refused(golden):
    with pytest.raises(UserError, match="did you mean lru"):
        policy("lruu")
    with pytest.raises(UserError, match="needs a profile"):
        replay(golden, 8, policy("hot-set"), [2])
    for settings in itertools.chain(
        [{"half_life": 0.0, "frequency": True}, {"future": "window"}],
        [{"frequency": True, "profile": True}, {"window": 3}],
        [{"near": 2.0}, {"refresh": 8}, {"distance": True}, {"shallow": 1.5}],
        [{"shallow": 0.5, "profile": True}, {"shallow": 0.5, "frequency": True}],
    ):
        with pytest.raises(UserError):
            CacheScore(**settings)
