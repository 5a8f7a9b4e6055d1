"""An engine on a device is the engine on the processor, whatever the device has room for."""

import math

import pytest
import torch

pytest.importorskip("triton")

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.packed import PAGE
from moekit.runtime.budget import OVERHEAD_SHARE
from moekit.runtime.device import opening
from moekit.runtime.device.device import open_device
from moekit.runtime.device.linear import EncodedLinear
from moekit.runtime.store import ExpertStore
from tests.families.tiny import TINY, build_tiny
from tests.runtime.device.fake_device import FakeDevice

# More than the kernels for few tokens take, and one.
IDS = [3, 17, 5, 80, 41, 9, 77]
# Products of the same weights in float32, summed in another order, over two layers.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A device that computes at once and copies late takes the place of the GPU."""
    made = FakeDevice(immediate=True)
    for where in ("moekit.runtime.open.open_device", "moekit.runtime.open_packed.open_device"):
        monkeypatch.setattr(where, lambda name: made)
    monkeypatch.setattr(opening, "CONTEXT_BYTES", 0)
    return made


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size, config.num_hidden_layers = 32, 2
    build_tiny("qwen3_moe", dtype=torch.float32, config=config).save_pretrained(path / "m")
    pack(path / "m", path / "out", codec="int4")
    return path / "out"


def logits(engine):
    """Of a prompt at once and of one more token."""
    with engine:
        seq = engine.runner.new_sequence(32)
        rows = engine.runner.forward([seq], [IDS[:-1]], all_positions=True)
        rows += [engine.runner.forward([seq], [[token]]) for token in IDS[-1:]]
        return torch.cat(rows), engine.stats


OPTIONS = {"device": "cuda", "max_context": 32, "streams": 1, "dtype": "float32"}


@pytest.fixture
def on_device(packed, device):
    """Opens an engine whose GPU has room for a share of the experts."""
    with moekit.open_engine(packed, gpu_memory=2**30, **OPTIONS) as engine:
        budget = engine.gpu_budget

    def opened(share, **options):
        room = int(share * budget.all_experts) // PAGE * PAGE
        limit = math.ceil((budget.needs.total + room + 1) / (1 - OVERHEAD_SHARE))
        engine = moekit.open_engine(packed, gpu_memory=limit, **{**OPTIONS, **options})
        assert engine.gpu_budget.expert_cache == room
        return engine

    return opened


@pytest.fixture(scope="module")
def expected(packed):
    engine = moekit.open_engine(packed, runner="graph", dtype="float32", max_context=32)
    return logits(engine)[0]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_logits_are_those_of_the_processor(on_device, expected, share):
    found, stats = logits(on_device(share))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (stats.hits + stats.misses == 0) == (share == 1.0)
    assert stats.bytes_copied > 0


def test_same_bits_at_every_size_of_the_cache(on_device):
    whole, _ = logits(on_device(1.0))
    for share, options in ((0.6, {"predictor": "next-gate"}), (0.3, {"policy": "lru"})):
        assert torch.equal(logits(on_device(share, **options))[0], whole)


@pytest.mark.parametrize("scheduler", ["hybrimoe", "static-split"])
def test_experts_on_the_processor_too(on_device, expected, scheduler):
    engine = on_device(0.3, scheduler=scheduler)
    assert any(line.startswith(f"{scheduler}: an expert takes") for line in engine.notes)
    cache = engine.cache
    found, _ = logits(engine)
    torch.testing.assert_close(found, expected, **CLOSE)
    if scheduler == "static-split":
        assert cache.stats.host > 0


def test_little_ram_below(packed, on_device, expected):
    with ExpertStore.open(packed) as store:
        part = store.expert_bytes // 3
    engine = on_device(0.3, expert_cache=part)
    assert engine.cache.below.nbytes <= part
    assert engine.budget.limit == sum(n for name, n, _ in engine.budget.rows() if name != "limit")
    found, stats = logits(engine)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert stats.bytes_read > 0


def test_generates_and_gives_everything_back(on_device, device):
    with on_device(0.6) as engine:
        made = engine.generate([IDS, IDS[:3]], 2)
        assert [len(row) for row in made] == [9, 5]
        assert device.pinned
    assert not device.pinned


def test_linear_layers_encoded(packed, on_device, expected):
    with on_device(1.0) as engine:
        plain = engine.gpu_budget.needs.resident
    engine = moekit.open_engine(packed, resident_codec="int8", **OPTIONS)
    encoded = [m for m in engine.runner.model.modules() if isinstance(m, EncodedLinear)]
    assert encoded
    assert engine.gpu_budget.needs.resident < plain
    found, _ = logits(engine)
    # Eight bits of the attention and of the head, beside four of the experts: near and not equal.
    assert not torch.allclose(found, expected, **CLOSE)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory": 1000}, "gpu_memory 1.00 kB is too little: GPU context"),
        ({"gpu_memory": 2**50}, "is more than the GPU has"),
        ({"scheduler": "fastest"}, "scheduler fastest is none of on-demand, hybrimoe"),
        ({"runner": "native"}, "the native runner is for the processor"),
        ({"policy": "belady"}, "knows the future"),
    ],
)
def test_refusals(packed, device, options, message):
    with pytest.raises(UserError, match=message):
        moekit.open_engine(packed, device="cuda", max_context=32, **options)
    assert not device.pinned


def test_options_of_a_gpu_without_one(packed):
    with pytest.raises(UserError, match="gpu_memory needs a GPU"):
        moekit.open_engine(packed, gpu_memory="1GB")
    with pytest.raises(UserError, match="scheduler needs a GPU"):
        moekit.open_engine(packed, scheduler="hybrimoe")


def test_layers_without_kernels_are_refused(tmp_path, device):
    build_tiny("longcat_flash", dtype=torch.float32).save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "out", codec="fp32")
    with pytest.raises(UserError, match="the GPU kernels cannot compute the experts of"):
        moekit.open_engine(tmp_path / "out", device="cuda", max_context=32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(UserError, match="--device cuda: this torch sees no GPU"):
        open_device("cuda")
    with pytest.raises(UserError, match="--device tpu is none of"):
        open_device("tpu")
