"""ExpertCache: the decisions of the simulator, for every policy, within its bytes."""

import itertools
import random

import numpy as np
import pytest

from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.packed import PAGE
from moekit.core.registry import registry
from moekit.core.replay import replay
from moekit.runtime.expert_cache import ExpertCache
from tests.runtime.fake_store import FakeStore, portions, serve

ALL_POLICIES = [method.name for method in registry.methods(kind="policy")]
POLICIES = [name for name in ALL_POLICIES if policy(name).future == "none"]
LAYERS, EXPERTS, WIDTH = 3, 12, 2


def sticky(steps, seed=0, keep=0.7):
    """Experts [T, L, K] that often stay for the next token, some liked more than others."""
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=(LAYERS, EXPERTS))
    rows = np.empty((steps, LAYERS, WIDTH), dtype=np.int64)
    for step, layer in itertools.product(range(steps), range(LAYERS)):
        fresh = np.argsort(-(rng.gumbel(size=EXPERTS) + liking[layer]))[:WIDTH]
        rows[step, layer] = fresh
        if step and rng.random() < keep:
            rows[step, layer] = rows[step - 1, layer]
    return rows


def scores_of(ids, seed=1):
    """Router scores [T, L, E] whose best are `ids`."""
    scores = np.random.default_rng(seed).random((*ids.shape[:2], EXPERTS)) / 2
    np.put_along_axis(scores, ids, 0.6 + np.arange(WIDTH)[None, None, ::-1] / 10, axis=2)
    return scores


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])
@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_those_of_the_simulator(name, per_layer):
    ids, score = sticky(120), policy(name)
    near = np.argsort(-scores_of(ids), axis=2)[..., : 2 * WIDTH]
    amounts = np.take_along_axis(scores_of(ids), near, axis=2)
    profile = np.stack([np.bincount(ids[:, n].ravel(), minlength=EXPERTS) for n in range(LAYERS)])
    for slots in (WIDTH + 1, EXPERTS // 2, EXPERTS - 1):
        if per_layer:
            expected = replay(
                ids, EXPERTS, score, [slots], hold=True, profile=profile, gains=(near, amounts)
            ).hits[0]
            bytes_ = slots * LAYERS * PAGE
        else:
            first = np.arange(LAYERS)[:, None] * EXPERTS
            shared, shared_near = ((x + first).reshape(-1, 1, x.shape[2]) for x in (ids, near))
            expected = replay(
                shared,
                EXPERTS * LAYERS,
                score,
                [slots * LAYERS - 1],
                layers=LAYERS,
                hold=True,
                profile=profile.reshape(1, -1),
                gains=(shared_near, amounts.reshape(shared_near.shape)),
            ).hits[0]
            bytes_ = (slots * LAYERS - 1) * PAGE
        store = FakeStore.even(LAYERS, EXPERTS)
        with ExpertCache(store, bytes_, policy=name, per_layer=per_layer, profile=profile) as cache:
            if score.profile:
                cache.preload(profile)
            found = np.zeros(LAYERS, dtype=int)
            for step, layer in itertools.product(range(len(ids)), range(LAYERS)):
                cache.scored(layer, near[step, layer], amounts[step, layer])
                found[layer] += len(serve(cache, layer, ids[step, layer]))
            assert (found if per_layer else found.sum(keepdims=True)).tolist() == expected.tolist()
            assert cache.stats.hits == expected.sum()
            assert cache.stats.misses == ids.size - expected.sum() == cache.stats.demand_reads
            assert cache.stats.peak_bytes <= bytes_


@pytest.mark.parametrize("name", ALL_POLICIES)
@pytest.mark.parametrize("per_layer", [False, True])
def test_no_policy_takes_more_than_its_slots(name, per_layer):
    store = FakeStore.even(LAYERS, EXPERTS)
    options = {"policy": name, "per_layer": per_layer, "profile": np.ones((LAYERS, EXPERTS))}
    slots = 4 * LAYERS
    if policy(name).future != "none":
        with pytest.raises(UserError, match="for simulation only"):
            ExpertCache(store, slots * PAGE, **options)
        return
    with ExpertCache(store, slots * PAGE + PAGE - 1, **options) as cache:
        for step, layer in itertools.product(range(60), range(LAYERS)):
            serve(cache, layer, sticky(60)[step, layer])
            inside = (cache.table != 0).sum(axis=1)
            assert inside.sum() <= slots
            assert not per_layer or inside.max() <= 4
            assert cache._residency.held <= slots * PAGE


def test_the_best_of_both_is_an_upper_bound():
    """No policy that runs beats Belady, and random slots would do worse than the default."""
    ids = sticky(400)
    best = replay(ids, EXPERTS, policy("belady"), [6], hold=True).hit_rate[0]
    with ExpertCache(FakeStore.even(LAYERS, EXPERTS), 18 * PAGE, per_layer=True) as cache:
        for step, layer in itertools.product(range(400), range(LAYERS)):
            serve(cache, layer, ids[step, layer])
        assert 6 / EXPERTS < cache.stats.hit_rate <= best


def test_several_tokens_at_once_count_by_token():
    with ExpertCache(FakeStore.even(1, 8), 3 * PAGE, policy="lfu") as cache:
        serve(cache, 0, [0, 1, 2], counts=[5, 1, 2], tokens=6)
        serve(cache, 0, [3, 0])
        # Expert 1 had the fewest uses.
        assert np.flatnonzero(cache.table[0]).tolist() == [0, 2, 3]


def test_a_claimed_expert_is_never_evicted():
    with ExpertCache(FakeStore.even(2, 8), 3 * PAGE, policy="lru") as cache:
        with cache.begin(0, [0, 1]) as first:
            list(first.arrivals())
            before = cache.table[0, :2].copy()
            for expert in range(8):
                serve(cache, 1, [expert])
            assert (cache.table[0, :2] == before).all()
            assert all(cache.store.whole(cache.record(0, e), 0, e) for e in (0, 1))
            with cache.begin(1, [2, 3]) as second, pytest.raises(UserError, match="1 more experts"):
                list(second.arrivals())
        serve(cache, 1, [2, 3, 4])
        assert not cache.table[0].any()


def test_more_experts_than_slots_come_inportions():
    with ExpertCache(FakeStore.even(1, 16), 4 * PAGE) as cache:
        serve(cache, 0, [9, 3])
        for _ in range(2):
            seen = []
            with cache.begin(0, range(16)) as claim:
                for portion in portions(claim):
                    for expert in portion:
                        assert cache.store.whole(cache.record(0, expert), 0, expert)
                    seen += portion
                    assert np.count_nonzero(cache.table) <= 4
                    claim.done(portion)
            assert sorted(seen) == list(range(16))
        assert cache.stats.peak_bytes == 4 * PAGE
        assert not cache._pins.any()


def test_sizes_that_differ_share_the_bytes():
    """Large and small records in turn: the bytes in slots and in flight never pass the limit."""
    store = FakeStore([[1] * 10, [3] * 10, [1, 5] * 5])
    limit = 17 * PAGE
    with ExpertCache(store, limit, readers=2) as cache:
        sizes = cache._residency.sizes.reshape(cache.table.shape)

        def within(layer, expert):
            with cache._lock:
                inside = int(sizes[cache.table != 0].sum())
                coming = sum(load.slot.size for load in cache._loads.values())
                assert inside + coming <= cache._residency.held <= limit

        store.before = within
        rng = random.Random(0)
        for step in range(300):
            layer = step % 3
            serve(cache, layer, rng.sample(range(10), 2))
        assert cache.stats.evictions > 100
        assert cache.stats.peak_bytes <= limit
    store = FakeStore([[1, 9]])
    with pytest.raises(UserError, match=rf"takes {9 * PAGE} bytes; the {8 * PAGE} bytes"):
        ExpertCache(store, 8 * PAGE)


def test_layers_of_different_widths():
    store = FakeStore([[1] * 4, [1] * 2])
    with ExpertCache(store, 6 * PAGE) as cache:
        cache.load_all()
        assert cache.complete is True
        assert (cache.table != 0).tolist() == [[True] * 4, [True, True, False, False]]
        cache.hint(1, [3, 1])
        with pytest.raises(IndexError, match="layer 1 has no such expert"):
            cache.begin(1, [0, 3])
        assert cache.complete


@pytest.mark.parametrize("per_layer", [False, True])
def test_load_all(per_layer):
    store = FakeStore.even(LAYERS, EXPERTS)
    seen = []
    with ExpertCache(store, 36 * PAGE, per_layer=per_layer) as cache:
        serve(cache, 1, [4, 5])
        assert cache.complete is False
        cache.load_all(seen.append)
        assert cache.complete
        assert seen[-1] == 36 * PAGE
        assert seen == sorted(seen)
        assert sorted(store.reads) == list(itertools.product(range(LAYERS), range(EXPERTS)))
        assert serve(cache, 2, [1, 7]) == [1, 7]
        assert (cache.stats.preload_reads, cache.stats.demand_reads) == (34, 2)
    with (
        ExpertCache(store, 36 * PAGE - 1) as cache,
        pytest.raises(UserError, match=f"take {36 * PAGE} bytes"),
    ):
        cache.load_all()


@pytest.mark.parametrize("shape", [(1, 8), (2, 7)])
def test_a_profile_of_another_model_is_refused(shape):
    with pytest.raises(UserError, match="does not fit"):
        ExpertCache(FakeStore.even(2, 8), 4 * PAGE, policy="hot-set", profile=np.ones(shape))
