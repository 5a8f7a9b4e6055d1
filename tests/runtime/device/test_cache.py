"""DeviceCache: its decisions are the simulator's, and no order of work on a device breaks it."""

import itertools
from functools import partial

import numpy as np
import pytest

from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.packed import PAGE
from moekit.core.replay import replay
from moekit.runtime.device.arena import Arena, Arenas
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.pages import page_aligned
from moekit.runtime.schedule.split import SplitCosts, greedy_split, static_split
from moekit.runtime.store import StoreError
from tests.runtime.device.fake_device import FakeDevice
from tests.runtime.fake_store import FakeStore, settle

LAYERS, EXPERTS, WIDTH = 3, 8, 3
ORDERS = ["any", "copies first", "computing first"]


def tiers(store, pages, ram_pages, device=None, **options):
    """A cache on a device over one in pinned memory."""
    device = device or FakeDevice()
    memory = page_aligned(ram_pages * PAGE)
    device.pin(memory)
    below = ExpertCache(store, ram_pages * PAGE, new_slots=Arenas(memory))
    return DeviceCache(
        below, device, pages * PAGE, on_close=lambda: device.unpin(memory), **options
    )


def check(cache, layer, expert, seen):
    """Computing that looks at the record of an expert when its time comes."""
    record = cache.record(layer, expert)
    cache.device.launch(lambda: seen.append(cache.store.whole(record, layer, expert)))


def use(cache, layer, experts, seen, done=True, **options):
    """Use experts as a backend does; those ready and those given to the processor."""
    host = []
    with cache.begin(layer, experts, **options) as claim:
        for portion in claim.portions():
            for expert in portion.device:
                check(cache, layer, expert, seen)
            for expert in portion.host:
                record = cache.below.record(layer, expert)
                seen.append(cache.store.whole(record, layer, expert))
            host += portion.host
            if done:
                claim.done([*portion.device, *portion.host])
        assert sorted(host) == sorted(claim.host)
        return claim.ready, sorted(host)


def drawn(steps, seed=0):
    """Experts [T, L, K] of a skewed routing."""
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=(LAYERS, EXPERTS))
    scores = liking + rng.gumbel(size=(steps, LAYERS, EXPERTS))
    return np.argsort(-scores, axis=2)[..., :WIDTH]


@pytest.mark.parametrize("name", ["auto", "lru", "lfu"])
def test_decisions_are_those_of_the_simulator(name):
    ids, slots = drawn(60), 10
    first = np.arange(LAYERS)[:, None] * EXPERTS
    expected = replay(
        (ids + first).reshape(-1, 1, WIDTH),
        LAYERS * EXPERTS,
        policy(name),
        [slots],
        layers=LAYERS,
        hold=True,
    ).hits[0]
    store, seen = FakeStore.even(LAYERS, EXPERTS), []
    with tiers(store, slots, LAYERS * EXPERTS, policy=name) as cache:
        for step, layer in itertools.product(range(len(ids)), range(LAYERS)):
            use(cache, layer, ids[step, layer], seen)
        assert cache.stats.hits + cache.stats.late == expected.sum()
        assert cache.stats.demand_bytes == cache.device.copied_bytes
        assert cache.stats.demand_reads == ids.size - expected.sum()
        cache.device.finish()
    assert len(seen) == ids.size
    assert all(seen)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_work_shows_a_wrong_expert(order, seed):
    """Small tiers, hints, both kinds of record; checked when the device comes to compute."""
    sizes = [[1 + (layer + e) % 3 for e in range(EXPERTS)] for layer in range(LAYERS)]
    store, device, seen = FakeStore(sizes), FakeDevice(seed, order), []
    rng = np.random.default_rng(seed)
    ids = drawn(25, seed)
    with tiers(store, 14, 24, device) as cache:
        for step, layer in itertools.product(range(len(ids)), range(LAYERS)):
            hinted = rng.permutation(EXPERTS)[:3].tolist()
            cache.then(partial(cache.hint, (layer + 1) % LAYERS, hinted))
            use(cache, layer, ids[step, layer], seen)
        held = sum(int(cache._residency.sizes[n]) for n in np.flatnonzero(cache._flat))
        assert held == sum(pool.memory.held for pool in cache._residency.pools) <= 14 * PAGE
        stats = cache.stats
        assert stats.demand_bytes + stats.prefetch_bytes == device.copied_bytes
        assert stats.prefetch_reads > 0
        assert stats.peak_bytes <= 14 * PAGE
        device.finish()
    assert len(seen) == ids.size
    assert all(seen)


def test_a_copy_waits_for_the_computing_that_reads_its_slot():
    store, device, seen = FakeStore.even(1, 4), FakeDevice(order="copies first"), []
    device.go_on = lambda: None
    with tiers(store, 1, 4, device) as cache:
        cache.below.load_all()
        for expert in (0, 1, 0, 3):
            use(cache, 0, [expert], seen)
        assert seen == []
        device.finish()
    assert seen == [True] * 4


def test_what_is_claimed_is_never_evicted():
    store, seen = FakeStore.even(2, 4), []
    with tiers(store, 2, 8) as cache:
        first = cache.begin(0, [0, 1])
        assert sorted(e for portion in first.portions() for e in portion.device) == [0, 1]
        with pytest.raises(UserError, match="1 more experts do not fit"):
            use(cache, 1, [2], seen)
        assert cache.table[0, 0] != 0
        assert cache.table[0, 1] != 0
        first.done([0, 1])
        first.release()
        use(cache, 1, [2], seen)
        cache.device.finish()
    assert seen == [True]


def test_more_experts_than_slots_come_one_after_the_other():
    store, seen = FakeStore.even(1, 8), []
    with tiers(store, 2, 2) as cache:
        use(cache, 0, range(8), seen)
        cache.device.finish()
        assert cache.stats.misses == 8
    assert seen == [True] * 8
    with tiers(store, 2, 8) as cache, pytest.raises(UserError, match="say which are done"):
        use(cache, 0, range(8), [], done=False)


def test_hints_are_copied_before_they_are_asked_for():
    store, seen = FakeStore.even(2, 4), []
    with tiers(store, 4, 8) as cache:
        cache.below.load_all()
        use(cache, 0, [0], seen)
        cache.hint(1, [2, 3])
        cache.device.finish()
        ready, _ = use(cache, 1, [2, 1], seen)
        assert ready == [2]
        stats = cache.stats
        assert (stats.hits, stats.misses, stats.prefetch_hits, stats.late) == (1, 2, 1, 0)
        assert (stats.prefetch_bytes, stats.demand_bytes) == (2 * PAGE, 2 * PAGE)
        cache.device.finish()
        # Expert 3 of layer 1 was copied in vain and makes room in the end.
        for expert in range(4):
            use(cache, 0, [expert], seen)
        assert stats.wasted_bytes == PAGE
        cache.device.finish()
    assert all(seen)


def test_a_hint_for_what_is_on_disk_is_read_into_ram():
    store = FakeStore.even(2, 4)
    with tiers(store, 4, 8) as cache:
        cache.hint(1, [2])
        settle(cache.below)
        assert cache.below.table[1, 2] != 0
        assert cache.table[1, 2] == 0
        cache.hint(1, [2])
        assert cache.table[1, 2] != 0
        cache.device.finish()


def test_a_late_copy_is_a_miss():
    store, device, seen = FakeStore.even(2, 4), FakeDevice(), []
    with tiers(store, 4, 8, device) as cache:
        cache.below.load_all()
        go_on, device.go_on = device.go_on, lambda: None
        cache.hint(1, [2])
        ready, _ = use(cache, 1, [2], seen)
        assert ready == [2]
        assert (cache.stats.hits, cache.stats.misses, cache.stats.late) == (0, 1, 1)
        device.go_on = go_on
        device.finish()
    assert seen == [True]


def test_all_experts_at_once_through_little_ram():
    store, copied = FakeStore.even(LAYERS, EXPERTS), []
    with tiers(store, LAYERS * EXPERTS, 2) as cache:
        cache.load_all(copied.append)
        assert cache.complete
        assert copied[-1] == LAYERS * EXPERTS * PAGE == cache.stats.preload_bytes
        for layer, expert in itertools.product(range(LAYERS), range(EXPERTS)):
            assert store.whole(cache.record(layer, expert), layer, expert)
    with tiers(store, 4, 2) as cache, pytest.raises(UserError, match="all experts take"):
        cache.load_all()


def test_the_processor_computes_what_the_scheduler_says():
    store, seen = FakeStore.even(1, 6), []
    costs = SplitCosts(cpu_token=1.0, gpu_expert=0.1, transfer=5.0)
    with tiers(store, 3, 6, scheduler=lambda loads: static_split(loads, costs)) as cache:
        cache.preload([[9, 8, 7, 0, 0, 0]])
        assert use(cache, 0, [1, 3, 5], seen) == ([1], [3, 5])
        assert (cache.stats.hits, cache.stats.misses, cache.stats.host) == (1, 2, 2)
        assert cache.device.copied_bytes == cache.stats.preload_bytes
        cache.device.finish()
    assert seen == [True] * 3


def test_many_tokens_of_an_expert_are_worth_a_copy():
    store, seen = FakeStore.even(1, 6), []
    costs = SplitCosts(cpu_token=1.0, gpu_expert=0.1, transfer=5.0)
    with tiers(store, 6, 6, scheduler=lambda loads: greedy_split(loads, costs)) as cache:
        assert use(cache, 0, [0, 1], seen, counts=[40, 1])[1] == [1]
        cache.device.finish()
    assert all(seen)


@pytest.mark.parametrize("order", ORDERS)
def test_a_failed_read_leaves_the_tiers_usable(order):
    store, seen = FakeStore.even(1, 6), []
    with tiers(store, 3, 3, FakeDevice(1, order)) as cache:
        store.broken.add((0, 4))
        with pytest.raises(StoreError, match="expert 4"):
            use(cache, 0, [3, 4, 5], seen)
        store.broken.clear()
        use(cache, 0, range(6), seen)
        cache.device.finish()
    assert all(seen)


def test_an_expert_that_is_not_there():
    with tiers(FakeStore([[1, 1], [1]]), 2, 2) as cache, pytest.raises(IndexError):
        cache.begin(1, [1])


def test_arena_joins_what_is_given_back():
    arena = Arena(page_aligned(8 * PAGE), PAGE, 8 * PAGE)
    slots = [arena.take(PAGE) for _ in range(7)]
    assert arena.take(PAGE) is None
    assert [slot.offset for slot in slots] == [n * PAGE for n in range(1, 8)]
    for slot in (slots[2], slots[4]):
        arena.give(slot)
    assert arena.take(2 * PAGE) is None
    arena.give(slots[3])
    assert arena.held == 4 * PAGE
    assert arena.take(3 * PAGE).offset == 3 * PAGE
    for slot in (*slots[:2], *slots[5:]):
        arena.give(slot)
    assert arena.held == 3 * PAGE
