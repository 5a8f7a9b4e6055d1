"""NativeRunner: logits and greedy tokens of transformers, and bits that nothing else changes."""

import numpy as np
import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.ops.codecs import make_codec
from moekit.ops.native import library
from moekit.runtime.decoder_families import FAMILIES
from moekit.runtime.decoder_shape import supports
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.native_runner import NativeRunner
from moekit.runtime.store import ExpertStore, StoreError
from tests.families.rows import VOCAB
from tests.families.tiny import TINY, build_tiny

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

# float32 on both sides: what differs is the order of sums, some 1e-6 of the largest logit here.
CLOSE = 1e-4
FIRST = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v3")
ALL = [f if f in FIRST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """family -> its tiny model and an open store of it, packed once."""
    made = {}

    def get(family, codec="fp32", **changes):
        key = (family, codec, *changes.items())
        if key not in made:
            config = TINY[family]()
            for name, value in changes.items():
                setattr(config, name, value)
            model = build_tiny(family, config=config)
            root = tmp_path_factory.mktemp(family)
            model.save_pretrained(root / "m")
            pack(root / "m", root / "p", codec=codec)
            made[key] = model, ExpertStore.open(root / "p")
        return made[key]

    return get


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(100 * length + seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@torch.no_grad()
def reference(model, ids):
    return model(torch.tensor([ids])).logits[0]


def run(runner, ids, **options):
    seq = runner.new_sequence(len(ids) + 16)
    return runner.forward([seq], [ids], **options)[0], seq


def greedy(runner, prompts, count):
    seqs = [runner.new_sequence(len(p) + count) for p in prompts]
    made = [[] for _ in prompts]
    new = prompts
    for _ in range(count):
        new = [[int(i)] for i in runner.forward(seqs, new).argmax(-1)]
        for tokens, token in zip(made, new, strict=True):
            tokens += token
    return made


@pytest.mark.parametrize("family", ALL)
def test_logits_are_those_of_transformers(packed, family):
    model, store = packed(family)
    ids = prompt(40)  # longer than the sliding window of 16
    expected = reference(model, ids)
    logits, _ = run(NativeRunner(store), ids, all_positions=True)
    assert (logits - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(20, 1, 8), (6, 2, 72), (4, 4, 256)])
def test_heads_of_any_number_and_width(packed, heads, kv_heads, dim):
    model, store = packed(
        "mixtral", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim
    )
    ids = prompt(70)  # several blocks of keys
    expected = reference(model, ids)
    runner = NativeRunner(store, threads=2)
    logits, _ = run(runner, ids, all_positions=True)
    assert (logits - expected).abs().max() <= CLOSE * expected.abs().max()
    seq = runner.new_sequence(70)
    assert torch.equal(torch.cat([runner.forward([seq], [[token]]) for token in ids]), logits)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_tokens_are_those_of_transformers(packed, family, batch):
    model, store = packed(family)
    prompts = [prompt(5 + 3 * i) for i in range(batch)]
    expected = []
    for ids in prompts:
        # Without a cache on this side, so that nothing is shared with what is tested.
        tokens = list(ids)
        for _ in range(8):
            tokens.append(int(reference(model, tokens)[-1].argmax()))
        expected.append(tokens[len(ids) :])
    assert greedy(NativeRunner(store, threads=2), prompts, 8) == expected


@pytest.mark.parametrize("family", FIRST)
def test_bits_do_not_depend_on_chunks_threads_or_neighbours(packed, family):
    check_bits(packed(family)[1])


@pytest.mark.parametrize("name", ["int8", "int4", "int3-zp", "nested4", "bf16"])
def test_bits_of_encoded_weights_depend_on_nothing_else_either(packed, name):
    _, store = packed("qwen2_moe", name, moe_intermediate_size=64, intermediate_size=64)
    check_bits(store, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    check_bits(store, codec=make_codec("int4"))


def check_bits(store, **options):
    ids = prompt(37)
    whole, _ = run(NativeRunner(store, **options), ids, all_positions=True)
    for threads, max_rows in ((1, 5), (2, 16), (3, 256)):
        other = NativeRunner(store, threads=threads, max_rows=max_rows, **options)
        assert torch.equal(run(other, ids, all_positions=True)[0], whole)
    seqs = [other.new_sequence(64) for _ in range(3)]
    together = other.forward(seqs, [prompt(11), ids, prompt(3)], all_positions=True)
    assert torch.equal(together[1], whole)
    seq = other.new_sequence(64)
    one_by_one = [other.forward([seq], [[token]])[0] for token in ids]
    assert torch.equal(torch.stack(one_by_one), whole)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_latents_are_what_is_kept_of_latent_attention(packed, kv_dtype):
    model, store = packed("deepseek_v3", kv_lora_rank=96)
    runner = NativeRunner(store, kv_dtype=kv_dtype, threads=2)
    layers = model.config.num_hidden_layers
    assert (
        runner.kv_bytes_per_token == layers * (96 + 32) * kv_dtype.itemsize
    )  # the rotated key fills a vector
    ids = prompt(150)  # several blocks of keys
    expected = reference(model, ids)
    logits, _ = run(runner, ids, all_positions=True)
    # bfloat16 rounds the latents, by 2**-9 of each.
    close = CLOSE if kv_dtype == torch.float32 else 2**-6
    assert (logits - expected).abs().max() <= close * expected.abs().max()
    seq = runner.new_sequence(150)
    assert torch.equal(torch.cat([runner.forward([seq], [[token]]) for token in ids]), logits)


def test_a_truncated_sequence_goes_on_as_a_fresh_one(packed):
    _, store = packed("mixtral")
    runner = NativeRunner(store)
    ids, other = prompt(30), prompt(9, seed=1)
    _, seq = run(runner, ids)
    seq.truncate(20)
    fresh, _ = run(runner, ids[:20] + other)
    assert torch.equal(runner.forward([seq], [other])[0], fresh)
    assert seq.length == 29
    with pytest.raises(ValueError, match="30 of 29"):
        seq.truncate(30)


def test_keys_and_values_in_bfloat16(packed):
    model, store = packed("qwen3_moe")
    ids = prompt(40)
    runner = NativeRunner(store, kv_dtype=torch.bfloat16)
    full = NativeRunner(store)
    assert 2 * runner.kv_bytes_per_token == full.kv_bytes_per_token
    logits, _ = run(runner, ids)
    expected = reference(model, ids)[-1]
    # Keys and values are off by up to 2**-9 of themselves, in each of three layers.
    assert 0 < (logits - expected).abs().max() <= 2**-5 * expected.abs().max()


class Portions:
    """Experts that come a few at a time, as from a cache that is too small for all of them."""

    def __init__(self, whole, ready, portion):
        self.table, self.ready_share, self.portion = whole.table.copy(), ready, portion
        self._whole, self.held = whole, set()
        self.table[:] = 0

    def begin(self, layer, experts, *, tokens=1, counts=None):
        assert counts is None or (len(counts) == len(experts) and max(counts) <= tokens)
        order = sorted(map(int, experts), key=lambda e: (7 * e) % 8)
        split = int(len(order) * self.ready_share)
        source = self

        class Claim:
            ready = order[:split]

            def arrivals(self):
                for start in range(split, len(order), source.portion):
                    yield source.bring(layer, order[start : start + source.portion])

            def done(self, experts):
                source.table[layer, list(experts)] = 0
                source.held -= set(experts)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                source.held.clear()

        self.bring(layer, Claim.ready)
        return Claim()

    def bring(self, layer, experts):
        self.held |= set(experts)
        self.table[layer, experts] = self._whole.table[layer, experts]
        return experts


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize(("ready", "portion"), [(0.0, 1), (0.5, 3), (1.0, 1)])
def test_bits_do_not_depend_on_how_experts_arrive(packed, family, ready, portion):
    _, store = packed(family)
    whole = NativeRunner(store, threads=2)
    parts = NativeRunner(store, threads=2, experts=Portions(whole.experts, ready, portion))
    check_same(parts, whole)


def check_same(runner, whole):
    ids = prompt(20)
    expected, seq = run(whole, ids, all_positions=True)
    logits, other = run(runner, ids, all_positions=True)
    assert torch.equal(logits, expected)
    for token in range(5, 10):
        assert torch.equal(runner.forward([other], [[token]]), whole.forward([seq], [[token]]))


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_bits_do_not_depend_on_the_expert_cache(packed, kept):
    _, store = packed("qwen3_moe")
    with ExpertCache(store, kept * store.nbytes(0, 0)) as cache:
        check_same(NativeRunner(store, experts=cache), NativeRunner(store))
        assert cache.stats.misses > 0


def test_observer_sees_the_routing_and_what_the_router_saw(packed):
    model, store = packed("qwen3_moe")
    seen = []

    def observe(routed):
        seen.append((routed.layer, routed.ids.copy(), routed.weights.copy(), routed.hidden.copy()))

    runner = NativeRunner(store, observer=observe)
    ids = prompt(6)
    logits, _ = run(runner, ids)
    assert torch.equal(logits, run(NativeRunner(store), ids)[0])
    assert [layer for layer, *_ in seen] == list(range(len(store.layers)))
    for layer, chosen, weights, hidden in seen:
        gate = model.get_submodule(store.layers[layer].path).gate
        with torch.no_grad():
            raw, expected, where = gate(torch.from_numpy(hidden))
        assert np.array_equal(chosen, where)
        assert np.allclose(weights, expected, rtol=1e-5)
        assert np.allclose(runner.router_scores(layer, hidden), raw, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_resident_matrices_can_be_encoded(packed, name):
    # Widths that groups of 32 divide, or a matrix would stay as it is.
    model, store = packed("qwen2_moe", shared_expert_intermediate_size=64, intermediate_size=64)
    codec = make_codec(name)
    runner = NativeRunner(store, codec=codec)
    assert runner.resident_bytes < NativeRunner(store).resident_bytes
    decoded = build_tiny("qwen2_moe", config=model.config)
    with torch.no_grad():
        for module_name, module in decoded.named_modules():
            if isinstance(module, torch.nn.Linear) and "shared_expert_gate" not in module_name:
                module.weight.copy_(codec.decode(codec.encode(module.weight)))
    ids = prompt(20)
    expected = reference(decoded, ids)[-1]
    logits, _ = run(runner, ids)
    # Activations are rounded to bfloat16 before every encoded matrix, 2**-9 each time.
    assert (logits - expected).abs().max() <= 2**-4 * expected.abs().max()


def test_what_it_holds_is_what_it_says(packed):
    _, store = packed("qwen3_moe")
    runner = NativeRunner(store, max_rows=32)
    stored = sum(tensor.nbytes for _, tensor in store.resident())
    # The file as it is, its header and its last page included, and vectors beside it.
    vectors = sum(tensor.nbytes for _, tensor in store.resident() if tensor.ndim == 1)
    (file,) = store.header.resident_files
    pages = -(-(store.path / file).stat().st_size // 4096) * 4096
    assert stored < runner.resident_bytes == pages + vectors
    assert runner.kv_bytes_per_token == 3 * 2 * (8 + 32) * 4  # layers, heads, key and value, bytes
    assert runner.scratch_bytes > 0
    seq = runner.new_sequence(100)
    runner.drop(seq)
    assert seq.memory is None


def test_wrong_steps_are_refused(packed):
    _, store = packed("mixtral")
    runner = NativeRunner(store)
    seq = runner.new_sequence(4)
    with pytest.raises(ValueError, match="5 tokens after 0 of 4"):
        runner.forward([seq], [[3] * 5])
    with pytest.raises(ValueError, match="0 tokens"):
        runner.forward([seq], [[]])
    with pytest.raises(ValueError, match="token ids"):
        runner.forward([seq], [[VOCAB]])
    with pytest.raises(ValueError, match="twice"):
        runner.forward([seq, seq], [[3], [4]])
    assert seq.length == 0


def test_what_it_does_not_run_has_a_reason(packed, tmp_path):
    assert "jamba" in supports(TINY["jamba"]())
    config = TINY["qwen3_moe"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in supports(config)
    build_tiny("jamba").save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "p", codec="fp32")
    with pytest.raises(UserError, match="native runner does not run this model: jamba"):
        NativeRunner(ExpertStore.open(tmp_path / "p"))


def test_a_missing_tensor_is_named(packed, monkeypatch):
    _, store = packed("mixtral")
    whole = list(store.resident_stored())
    monkeypatch.setattr(store, "resident_stored", lambda **_: iter(whole[1:]))
    with pytest.raises(StoreError, match=whole[0][0]):
        NativeRunner(store)
