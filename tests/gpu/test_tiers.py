"""The tier above RAM on a real GPU: what a kernel sees is the expert it asked for."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.packed import PAGE
from moekit.runtime.device.arena import Arenas
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.pages import page_aligned
from tests.runtime.fake_store import FakeStore

LAYERS, EXPERTS, WIDTH, PAGES = 4, 16, 4, 64


@pytest.fixture
def device():
    from moekit.runtime.device.device import open_device

    return open_device("cuda")


def tiers(store, device, pages, ram_pages):
    memory = page_aligned(ram_pages * PAGE)
    device.pin(memory)
    below = ExpertCache(store, ram_pages * PAGE, new_slots=Arenas(memory))
    made = DeviceCache(below, device, pages * PAGE)
    made.on_close = lambda: device.unpin(memory)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_stress(device, seed):
    """Busy kernels between copies, several sizes of record, hints; wrong bytes are counted on the
    GPU, so nothing waits for it until the end."""
    sizes = [[PAGES * (1 + (e + n) % 3) for e in range(EXPERTS)] for n in range(LAYERS)]
    store, rng = FakeStore(sizes), np.random.default_rng(seed)
    wrong = torch.zeros((), dtype=torch.int64, device=device.torch_device)
    load = torch.randn(1024, 1024, device=device.torch_device)
    with tiers(store, device, PAGES * 24, PAGES * 60) as cache:
        for _, layer in itertools.product(range(60), range(LAYERS)):
            hinted = rng.permutation(EXPERTS)[:3].tolist()
            cache.then(partial(cache.hint, (layer + 1) % LAYERS, hinted))
            chosen = np.sort(rng.choice(EXPERTS, WIDTH, replace=False))
            with cache.begin(layer, chosen) as claim:
                for portion in claim.portions():
                    load = torch.tanh(load @ load)
                    for expert in portion.device:
                        record = cache.record(layer, expert)
                        wrong += (record != store.mark(layer, expert)).sum()
                    claim.done(portion.device)
        assert int(wrong) == 0
        assert cache.stats.prefetch_reads > 0
        assert cache.stats.peak_bytes <= cache.nbytes
        assert cache.memory.is_cuda


def test_copies_overlap_with_computing(device):
    """A copy that computing does not wait for is done while it runs."""
    store = FakeStore.even(1, 2, pages=PAGES)
    with tiers(store, device, 2 * PAGES, 2 * PAGES) as cache:
        cache.below.load_all()
        load = torch.randn(4096, 4096, device=device.torch_device)
        torch.cuda.synchronize()
        for _ in range(200):
            load = torch.tanh(load @ load)
        busy = device.mark()
        cache.hint(0, [0, 1])
        cache._copies.settle(wait=True)
        assert not busy.done()
        busy.wait()


def test_pinning_twice_is_refused(device):
    memory = page_aligned(PAGE)
    device.pin(memory)
    with pytest.raises(UserError, match="cannot be pinned"):
        device.pin(memory)
    device.unpin(memory)
