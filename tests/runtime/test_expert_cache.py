"""ExpertCache: the decisions of the simulator, within its bytes, and no hang whatever fails."""

import itertools
import os
import random
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.packed import PAGE
from moekit.core.registry import registry
from moekit.core.replay import replay
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.store import ExpertStore, StoreError
from tests.core.test_pack import saved, wide
from tests.runtime.fake_store import FakeStore

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


def serve(cache, layer, experts, **options):
    """Use experts as an engine does; returns those that were ready."""
    with cache.begin(layer, experts, **options) as claim:
        for portion in (claim.ready, *claim.arrivals()):
            for expert in portion:
                assert cache.store.whole(cache.record(layer, expert), layer, expert)
        return claim.ready


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
                gains = (near[step, layer], amounts[step, layer])
                found[layer] += len(serve(cache, layer, ids[step, layer], gains=gains))
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


def test_more_experts_than_slots_come_in_portions():
    with ExpertCache(FakeStore.even(1, 16), 4 * PAGE) as cache:
        serve(cache, 0, [9, 3])
        for _ in range(2):
            seen = []
            with cache.begin(0, range(16)) as claim:
                for portion in _portions(claim):
                    for expert in portion:
                        assert cache.store.whole(cache.record(0, expert), 0, expert)
                    seen += portion
                    assert np.count_nonzero(cache.table) <= 4
                    claim.done(portion)
            assert sorted(seen) == list(range(16))
        assert cache.stats.peak_bytes == 4 * PAGE
        assert not cache._pins.any()


def _portions(claim):
    if claim.ready:
        yield claim.ready
    yield from claim.arrivals()


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
        assert cache.complete
        assert (cache.table != 0).tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("per_layer", [False, True])
def test_load_all(per_layer):
    store = FakeStore.even(LAYERS, EXPERTS)
    seen = []
    with ExpertCache(store, 36 * PAGE, per_layer=per_layer) as cache:
        serve(cache, 1, [4, 5])
        assert not cache.complete
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


def test_a_read_that_fails_is_tried_again():
    store = FakeStore.even(1, 8)
    store.broken = {(0, 2)}
    with ExpertCache(store, 3 * PAGE) as cache:
        for _ in range(3):
            with cache.begin(0, [1, 2]) as claim, pytest.raises(StoreError, match="expert 2"):
                list(claim.arrivals())
            assert not cache.table[0, 2]
            assert not cache._pins.any()
        store.broken = set()
        serve(cache, 0, [1, 2, 3])
        assert store.reads.count((0, 1)) == 1
        assert store.reads.count((0, 2)) == 4
        store.broken = {(0, 5)}
        with cache.begin(0, [4]) as claim:
            list(claim.arrivals())
        with pytest.raises(StoreError, match="expert 5"):
            serve(cache, 0, [5])
        assert cache.stats.peak_bytes <= 3 * PAGE


def test_errors_of_any_kind_reach_the_claim():
    store = FakeStore.even(1, 4)

    def fails(layer, expert):
        raise ZeroDivisionError

    store.before = fails
    with ExpertCache(store, 2 * PAGE) as cache:
        with cache.begin(0, [1]) as claim, pytest.raises(ZeroDivisionError):
            list(claim.arrivals())
        store.before = lambda layer, expert: None
        serve(cache, 0, [1])


def settle(cache, hints=True):
    """Wait until no read is in flight, and no hint is left to read."""
    with cache._lock:
        while cache._loads or (hints and cache._hints):
            assert cache._arrived.wait(30)


def test_a_hint_is_read_ahead_and_counted():
    store = FakeStore.even(2, 8)
    with ExpertCache(store, 6 * PAGE) as cache:
        serve(cache, 0, [0, 1])
        cache.hint(1, [3, 5])
        settle(cache)
        assert store.reads[2:] == [(1, 3), (1, 5)]
        assert serve(cache, 1, [5, 6]) == [5]
        stats = cache.stats
        assert (stats.hits, stats.misses, stats.prefetch_hits) == (1, 3, 1)
        assert (stats.prefetch_bytes, stats.demand_bytes) == (2 * PAGE, 3 * PAGE)
        # Expert 3 leaves unused.
        for expert in range(8):
            serve(cache, 0, [expert])
        assert stats.wasted_bytes == PAGE
        assert serve(cache, 1, [3]) == []


def test_a_hint_keeps_what_is_there_and_takes_no_claimed_room():
    store = FakeStore.even(2, 8)
    with ExpertCache(store, 4 * PAGE, policy="lru") as cache:
        serve(cache, 1, [0])
        serve(cache, 0, [1, 2, 3])
        cache.hint(1, [0])
        serve(cache, 0, [4, 5])
        # Least recently used, yet kept for its turn.
        assert serve(cache, 1, [0]) == [0]
        serve(cache, 0, [6, 7])
        with cache.begin(0, [1, 2, 3, 4]) as claim:
            list(claim.arrivals())

            def after_the_claim(layer, expert):
                assert not cache._pins.any()

            store.before = after_the_claim
            cache.hint(1, [5, 6])
            assert (cache.table[0, 1:5] != 0).all()
        settle(cache)
        assert store.reads[-2:] == [(1, 5), (1, 6)]
        assert (cache.table[1, 5:7] != 0).all()


def test_a_prefetch_in_flight_becomes_the_demand_read():
    store = FakeStore.even(2, 8)
    with ExpertCache(store, 6 * PAGE, readers=2) as cache:
        began, go_on = store.hold(1, 3)
        cache.hint(1, [3, 4])
        assert began.wait(30)
        claim = cache.begin(1, [3, 6])
        assert claim.ready == []
        assert next(claim.arrivals()) == [6]
        go_on.set()
        assert list(claim.arrivals()) == [[3]]
        claim.release()
        # Expert 4 was only hinted, for a step that is over.
        assert sorted(store.reads) == [(1, 3), (1, 6)]
        assert (cache.stats.late, cache.stats.prefetch_hits, cache.stats.misses) == (1, 0, 2)


def test_demands_go_before_hints_and_new_hints_replace_old_ones():
    store = FakeStore.even(3, 8)
    with ExpertCache(store, 12 * PAGE, readers=1) as cache:
        began, go_on = store.hold(0, 0)
        claim = cache.begin(0, [0])
        assert began.wait(30)
        cache.hint(1, [1, 2])
        cache.hint(2, [6])
        cache.hint(1, [3])
        other = cache.begin(0, [7])
        go_on.set()
        list(claim.arrivals())
        list(other.arrivals())
        settle(cache)
        # Then the hints of the nearest layer.
        assert store.reads == [(0, 0), (0, 7), (1, 3), (2, 6)]
        claim.release()
        other.release()


def test_hints_that_wait_come_after_the_next_claim():
    store = FakeStore.even(2, 8)
    with ExpertCache(store, 3 * PAGE, readers=1) as cache:
        serve(cache, 0, [0, 1, 2])
        before = len(store.reads)
        cache.hint(1, [3], wait=True)
        # Room for the hint would have cost one of these.
        with cache.begin(0, [0, 1, 2]) as claim:
            assert claim.ready == [0, 1, 2]
            cache.hint(1, [4], wait=True)
        serve(cache, 0, [0, 5])
        settle(cache)
        assert store.reads[before:] == [(0, 5), (1, 4)]


def test_a_prefetch_that_fails_hurts_nobody():
    store = FakeStore.even(2, 8)
    store.broken = {(1, 2)}
    with ExpertCache(store, 4 * PAGE) as cache:
        cache.hint(1, [2, 3])
        settle(cache)
        store.broken = set()
        assert serve(cache, 1, [2, 3]) == [3]


@pytest.mark.parametrize("readers", [1, 3])
def test_closing_while_reads_are_in_flight(readers):
    store = FakeStore.even(1, 8)
    began, go_on = store.hold(0, 0)
    cache = ExpertCache(store, 4 * PAGE, readers=readers)
    claim = cache.begin(0, [0, 1, 2])
    assert began.wait(30)
    closing = threading.Thread(target=cache.close)
    closing.start()
    with pytest.raises(ValueError, match="closed"):
        list(claim.arrivals())
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    claim.release()
    with pytest.raises(ValueError, match="closed"):
        cache.begin(0, [0])
    cache.close()


def test_giving_up_a_claim_gives_its_reads_up():
    store = FakeStore.even(1, 8)
    with ExpertCache(store, 3 * PAGE, readers=1) as cache:
        began, go_on = store.hold(0, 0)
        with cache.begin(0, [0, 1, 2]):
            assert began.wait(30)
        with cache.begin(0, [3, 4]) as claim:
            go_on.set()
            assert sorted(itertools.chain(*claim.arrivals())) == [3, 4]
        assert store.reads == [(0, 0), (0, 3), (0, 4)]


class Passing(StoreError):
    """A fault that is gone at the next read."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_layer", [False, True])
def test_anything_at_once(seed, per_layer):
    """Random claims, portions, hints and faults, with reads that take their time."""
    rng = random.Random(seed)
    store = FakeStore([[rng.choice([1, 1, 2, 4]) for _ in range(8)] for _ in range(3)])
    delays = random.Random(seed + 1)

    def slow(layer, expert):
        with cache._lock:
            assert cache._residency.held <= limit
        time.sleep(delays.random() * 1e-3)
        if delays.random() < 0.05:
            raise Passing("a fault")

    limit = 40 * PAGE
    with ExpertCache(store, limit, per_layer=per_layer, readers=3) as cache:
        store.before = slow
        failures = 0
        for step in range(150):
            layer = step % 3
            cache.hint((layer + 1) % 3, rng.sample(range(8), rng.randrange(5)))
            experts = rng.sample(range(8), rng.randrange(1, 9))
            with cache.begin(layer, experts) as claim, suppress(Passing):
                seen = []
                failures += 1
                for portion in _portions(claim):
                    for expert in portion:
                        assert store.whole(cache.record(layer, expert), layer, expert)
                    seen += portion
                    claim.done(portion)
                    if rng.random() < 0.1:
                        break
                else:
                    assert sorted(seen) == sorted(experts)
                failures -= 1
            assert not cache._pins.any()
        settle(cache, hints=False)
        inside = cache._residency.sizes[cache.table.reshape(-1) != 0].sum()
        assert inside <= cache._residency.held <= limit
        assert failures
        assert cache.stats.peak_bytes <= limit


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    pack(saved(wide(), root / "m"), root / "packed", codec="nested4")
    return root / "packed"


def test_records_of_a_store(packed):
    with ExpertStore.open(packed) as store:
        size = store.nbytes(0, 0)
        with ExpertCache(store, 3 * size) as cache:
            for expert in range(8):
                with cache.begin(1, [expert]) as claim:
                    list(claim.arrivals())
                    record = cache.record(1, expert)
                    assert record.data_ptr() == cache.table[1, expert]
                    pieces = store.fetch(record.clone(), 1, expert)
                    assert sum(len(piece) for piece in pieces) == len(record) == size
                    assert b"".join(p.numpy().tobytes() for p in pieces) == (
                        record.numpy().tobytes()
                    )


def test_a_file_that_is_cut_while_it_is_read(packed, tmp_path):
    """The expert that is gone raises; those before it still come."""
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with ExpertStore.open(tmp_path) as store, ExpertCache(store, store.expert_bytes) as cache:
        last = len(store.layers) - 1
        with cache.begin(last, [0]) as claim:
            list(claim.arrivals())
        file = tmp_path / "experts.safetensors"
        os.truncate(file, file.stat().st_size - store.nbytes(last, 7))
        for _ in range(2):
            with cache.begin(last, [0, 6, 7]) as claim, pytest.raises(StoreError, match="shorter"):
                list(claim.arrivals())
        with cache.begin(last, [0, 6]) as claim:
            assert sorted(claim.ready + list(itertools.chain(*claim.arrivals()))) == [0, 6]
        with pytest.raises(StoreError, match="shorter"):
            cache.load_all()


@pytest.mark.parametrize("shape", [(1, 8), (2, 7)])
def test_a_profile_of_another_model_is_refused(shape):
    with pytest.raises(UserError, match="does not fit"):
        ExpertCache(FakeStore.even(2, 8), 4 * PAGE, policy="hot-set", profile=np.ones(shape))
