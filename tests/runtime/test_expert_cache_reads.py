"""ExpertCache while it reads: hints, faults, closing, and anything at once."""

import itertools
import os
import random
import threading
import time
from contextlib import suppress

import pytest

from moekit.core.pack import pack
from moekit.core.packed import PAGE
from moekit.runtime import native_readers
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.store import ExpertStore, StoreError
from tests.core.test_pack import saved, wide
from tests.runtime.fake_store import FakeStore, portions, serve, settle


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


def test_what_is_to_be_done_then_comes_once_after_what_the_next_claim_needs():
    store, done = FakeStore.even(2, 8), []

    def hint(expert):
        # What the claim needs has been asked for.
        assert 5 in cache._loads
        done.append(expert)
        cache.hint(1, [expert])

    with ExpertCache(store, 3 * PAGE, readers=1) as cache:
        serve(cache, 0, [0, 1, 2])
        before = len(store.reads)
        cache.then(lambda: hint(3))
        cache.then(lambda: hint(4))
        assert done == []
        _, go_on = store.hold(0, 5)
        with cache.begin(0, [0, 5]) as claim:
            assert done == [4]
            go_on.set()
            assert list(claim.arrivals()) == [[5]]
        serve(cache, 0, [0])
        settle(cache)
        assert done == [4]
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
                for portion in portions(claim):
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


@pytest.fixture(params=["native", "threads"])
def readers(request, monkeypatch):
    """By whom records are read: native threads, or others where there are no kernels."""
    if request.param == "threads":
        monkeypatch.setattr(native_readers, "library", lambda: None)
    elif native_readers.library() is None:
        pytest.skip("there are no kernels")
    return request.param


def same(store, record, layer, expert):
    """Whether a record is what the store fetches."""
    pieces = store.fetch(record.clone(), layer, expert)
    return b"".join(p.numpy().tobytes() for p in pieces) == record.numpy().tobytes()


def test_records_of_a_store(packed, readers):
    with ExpertStore.open(packed) as store:
        size = store.nbytes(0, 0)
        with ExpertCache(store, 3 * size) as cache:
            for expert in range(8):
                with cache.begin(1, [expert]) as claim:
                    list(claim.arrivals())
                    record = cache.record(1, expert)
                    assert record.data_ptr() == cache.table[1, expert]
                    assert len(record) == size
                    assert same(store, record, 1, expert)
            stats = store.stats
            before = stats.experts, stats.reads, stats.bytes
            with cache.begin(0, [3, 4]) as claim:
                list(claim.arrivals())
            assert (stats.experts, stats.reads, stats.bytes) == (
                before[0] + 2,
                before[1] + 2,
                before[2] + 2 * size,
            )


def test_more_records_than_room(packed, readers):
    with ExpertStore.open(packed) as store, ExpertCache(store, 3 * store.nbytes(0, 0)) as cache:
        for layer in (0, 1, 0):
            seen = []
            with cache.begin(layer, range(8)) as claim:
                for portion in portions(claim):
                    assert all(same(store, cache.record(layer, e), layer, e) for e in portion)
                    seen += portion
                    claim.done(portion)
            assert sorted(seen) == list(range(8))
        assert cache.stats.hits + cache.stats.misses == 24
        assert not cache._pins.any()


def test_hints_of_a_store(packed, readers):
    """Read ahead, one after the other, found in time or not."""
    rng = random.Random(0)
    with ExpertStore.open(packed) as store, ExpertCache(store, 9 * store.nbytes(0, 0)) as cache:
        serve_store(cache, 0, [0, 1])
        cache.hint(1, [3, 5, 6])
        settle(cache)
        assert cache.stats.prefetch_reads == 3
        assert sorted(serve_store(cache, 1, [5, 3, 7])) == [3, 5]
        assert cache.stats.prefetch_hits == 2
        for step in range(300):
            layer = step % 2
            cache.hint(1 - layer, rng.sample(range(8), rng.randrange(4)))
            serve_store(cache, layer, rng.sample(range(8), 2))
        settle(cache, hints=False)
        stats = cache.stats
        assert stats.hits + stats.misses == 605
        assert stats.prefetch_hits > 0
        assert stats.peak_bytes <= cache.nbytes


def test_hints_are_read_while_nobody_asks(packed, readers):
    with ExpertStore.open(packed) as store, ExpertCache(store, store.expert_bytes) as cache:
        for layer, described in enumerate(store.layers):
            cache.hint(layer, range(described.num_experts))
        end = time.monotonic() + 30
        while not cache.complete:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert serve_store(cache, 1, [2, 5]) == [2, 5]


def serve_store(cache, layer, experts):
    with cache.begin(layer, experts) as claim:
        for portion in (claim.ready, *claim.arrivals()):
            assert all(same(cache.store, cache.record(layer, e), layer, e) for e in portion)
        return claim.ready


def test_a_byte_that_is_wrong(packed, tmp_path, readers):
    """The record it is in is refused every time, and no other."""
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with ExpertStore.open(tmp_path) as store:
        record = store._planes(1, 2, None)[1]
        with (tmp_path / record.file).open("r+b") as file:
            file.seek(record.offset + record.size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
        with ExpertCache(store, 4 * store.nbytes(0, 0)) as cache:
            for _ in range(2):
                with pytest.raises(StoreError, match=r"expert 2 of layer 1 \(plane 1"):
                    serve_store(cache, 1, [1, 2])
                assert not cache.table[1, 2]
                serve_store(cache, 1, [1, 3])
            # Nobody asked for it yet.
            cache.hint(1, [2])
            settle(cache)
            assert not cache.table[1, 2]


def test_a_file_that_is_gone_before_its_first_read(packed, tmp_path, readers):
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with ExpertStore.open(tmp_path) as store, ExpertCache(store, store.expert_bytes) as cache:
        (tmp_path / "experts.safetensors").unlink()
        with cache.begin(0, [0, 1]) as claim, pytest.raises(StoreError, match="No such file"):
            list(claim.arrivals())
        cache.hint(1, [2])
        settle(cache)
        assert not cache._pins.any()
        with pytest.raises(StoreError, match="No such file"):
            cache.load_all()


def test_closing_while_a_store_is_read(packed, readers):
    for _ in range(20):
        with ExpertStore.open(packed) as store:
            cache = ExpertCache(store, store.expert_bytes)
            claim = cache.begin(0, range(8))
            cache.hint(1, range(8))
            closing = threading.Thread(target=cache.close)
            closing.start()
            with suppress(ValueError):  # closed, unless all had come before
                list(claim.arrivals())
            closing.join(30)
            assert not closing.is_alive()


def test_a_file_that_is_cut_while_it_is_read(packed, tmp_path, readers):
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
