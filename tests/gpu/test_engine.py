"""An engine on the GPU beside the engine on the processor, and within its memory."""

import math

import pytest
import torch

pytest.importorskip("triton")

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.packed import PAGE
from moekit.runtime.budget import OVERHEAD_SHARE
from moekit.runtime.device.opening import CONTEXT_BYTES, WORKSPACE_BYTES
from tests.families.tiny import TINY, build_tiny

IDS = [3, 17, 5, 80, 41, 9, 77, 12, 55, 6]
OPTIONS = {"max_context": 64, "streams": 2}
# Gates and biases, clamped activation, shared experts, groups, dense layers before the MoE layers.
FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "olmoe"]


def packed(path, family="qwen3_moe", codec="int4", dtype=torch.float32, **changes):
    config = TINY[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    build_tiny(family, dtype=dtype, config=config).save_pretrained(path / "m")
    pack(path / "m", path / "out", codec=codec)
    return path / "out"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose experts are most of it."""
    path = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    return packed(path, dtype=torch.bfloat16, **changes)


def logits(engine):
    """Of a prompt at once and of three tokens one by one, and the tokens that greed chooses."""
    with engine:
        seq = engine.runner.new_sequence(64)
        rows = engine.runner.forward([seq], [IDS[:-3]], all_positions=True)
        rows += [engine.runner.forward([seq], [[token]]) for token in IDS[-3:]]
        return torch.cat(rows), engine.generate([IDS, IDS[:4]], 8)


def with_room(path, share, **options):
    """An engine whose GPU has room for a share of the experts."""
    with moekit.open_engine(path, device="cuda", **OPTIONS) as engine:
        needs, experts = engine.gpu_budget.needs, engine.gpu_budget.all_experts
    room = int(share * experts) // PAGE * PAGE
    limit = math.ceil((needs.total + room + 1) / (1 - OVERHEAD_SHARE))
    return moekit.open_engine(path, device="cuda", gpu_memory=limit, **OPTIONS, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_as_on_the_processor(tmp_path, family):
    path = packed(tmp_path, family, codec="fp32")
    expected, tokens = logits(moekit.open_engine(path, runner="graph", **OPTIONS))
    found, found_tokens = logits(moekit.open_engine(path, device="cuda", **OPTIONS))
    # Products in float32, summed in another order in every layer.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found_tokens == tokens


@pytest.mark.parametrize("codec", ["int8", "int4", "int3", "nested4", "bf16"])
def test_bfloat16_is_near_the_processor(tmp_path, codec):
    path = packed(tmp_path, codec=codec, dtype=torch.bfloat16, moe_intermediate_size=64)
    reference, _ = logits(moekit.open_engine(path, runner="graph", dtype="float32", **OPTIONS))
    host, _ = logits(moekit.open_engine(path, runner="graph", **OPTIONS))
    found, _ = logits(moekit.open_engine(path, device="cuda", **OPTIONS))

    def divergence(other):
        first, second = reference.log_softmax(-1), other.log_softmax(-1)
        return float((first.exp() * (first - second)).sum(-1).mean())

    # Both round their activations to bfloat16; the sums on the GPU are in float32.
    assert divergence(found) <= 1.5 * divergence(host) + 1e-6


def test_same_bits_at_every_size_of_the_cache(wide):
    whole = logits(with_room(wide, 1.0))
    for share, options in ((0.6, {}), (0.4, {"policy": "lru"}), (0.4, {"prefetch": False})):
        found = logits(with_room(wide, share, **options))
        assert torch.equal(found[0], whole[0])
        assert found[1] == whole[1]


def test_prefetching_changes_no_bit(wide):
    plain = logits(with_room(wide, 0.5, prefetch=False))
    engine = with_room(wide, 0.5, predictor="next-gate")
    cache = engine.cache
    found = logits(engine)
    assert torch.equal(found[0], plain[0])
    assert cache.stats.prefetch_reads > 0


@pytest.mark.parametrize("scheduler", ["hybrimoe", "fiddler", "static-split"])
def test_processor_beside_the_gpu(wide, scheduler):
    expected, _ = logits(with_room(wide, 1.0))
    engine = with_room(wide, 0.4, scheduler=scheduler)
    found, _ = logits(engine)
    # bfloat16 sums of the processor rounded once more than those of the GPU.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("resident_codec", [None, "int8"])
def test_memory_stays_within_the_limit(wide, share, resident_codec):
    engine = with_room(wide, share, resident_codec=resident_codec)
    limit = engine.gpu_budget.limit
    cache = engine.cache
    logits(engine)
    assert cache.device.peak_bytes() <= limit - CONTEXT_BYTES + WORKSPACE_BYTES


def test_what_cannot_fit_is_refused(wide):
    with pytest.raises(UserError, match=r"gpu_memory .* is too little"):
        moekit.open_engine(wide, device="cuda", gpu_memory="650MiB", **OPTIONS)


def test_a_gpu_that_is_not_there(wide):
    with pytest.raises(UserError, match="this torch sees"):
        moekit.open_engine(wide, device="cuda:99")
