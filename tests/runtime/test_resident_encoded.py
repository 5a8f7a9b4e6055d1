"""A resident part that is stored encoded: the same bytes as encoding it at opening, in place."""

import json

import pytest
import torch

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.ops.codecs import make_codec
from moekit.ops.native import library
from moekit.runtime.native_runner import NativeRunner
from moekit.runtime.store import ExpertStore, StoreError
from tests.families.tiny import TINY, build_tiny

native = pytest.mark.skipif(library() is None, reason="no C++ compiler")

# qwen2_moe has shared experts with a gate and dense layers, deepseek_v3 latents, granitemoe a head
# that is tied to the embedding.
FAMILIES = ("qwen2_moe", "deepseek_v3", "granitemoe")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> its tiny model and where it is saved, made once."""
    found = {}

    def get(family):
        if family not in found:
            config = TINY[family]()
            for name in ("shared_expert_intermediate_size", "intermediate_size"):
                if hasattr(config, name):
                    setattr(config, name, 64)
            config.tie_word_embeddings = family == "granitemoe"
            model = build_tiny(family, config=config)
            path = tmp_path_factory.mktemp(family) / "m"
            model.save_pretrained(path)
            found[family] = model, path
        return found[family]

    return get


def packed(made, family, out, **options):
    _, path = made(family)
    pack(path, out, codec="fp32", **options)
    return out


def linears(model):
    """The matrices that a resident codec encodes, by name."""
    shared = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in shared
        and module.out_features > 1
        and module.in_features % 32 == 0
        and not name.endswith((".gate", ".router", ".kv_b_proj"))
        and not name.endswith("router.layer")
    }


@pytest.mark.parametrize("codec", ["int4", "int8", "int4-zp", "nested4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_the_codec(made, tmp_path, family, codec):
    model, _ = made(family)
    packed(made, family, tmp_path / "p", resident_codec=codec)
    expected = linears(model)
    with ExpertStore.open(tmp_path / "p") as store:
        encoded = store.header.encoded
        assert set(encoded.matrices) == set(expected)
        assert store.stats.bytes == 0
        tensors = dict(store.resident())
        stored = dict(store.resident_stored(whole=True))
    state = model.state_dict()
    made_by = make_codec(codec)
    for name, tensor in tensors.items():
        whole = state[name]
        if name in expected:
            whole = made_by.decode(made_by.encode(whole))
            assert stored[name].dtype == torch.uint8
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, whole)


def test_rows_of_a_large_matrix_are_encoded_in_blocks(tmp_path):
    # 2,500 rows are more than a block of 2,048, and no whole number of tiles.
    config = TINY["qwen3_moe"]()
    config.vocab_size = 2500
    model = build_tiny("qwen3_moe", config=config)
    model.save_pretrained(tmp_path / "m")
    for codec in ("int4", "nested4", "bf16"):
        pack(tmp_path / "m", tmp_path / codec, codec="fp32", resident_codec=codec)
        with ExpertStore.open(tmp_path / codec) as store:
            head = dict(store.resident())["lm_head.weight"]
        made_by = make_codec(codec)
        assert torch.equal(head, made_by.decode(made_by.encode(model.lm_head.weight)))


@native
@pytest.mark.parametrize("codec", ["int4", "int8", "int4-zp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_encoding_at_opening(made, tmp_path, family, codec):
    plain = ExpertStore.open(packed(made, family, tmp_path / "plain"))
    ready = ExpertStore.open(packed(made, family, tmp_path / "ready", resident_codec=codec))
    ids = [5, 9, 2, 40, 7, 7, 61]

    def logits(runner):
        return runner.forward([runner.new_sequence(16)], [ids], all_positions=True)[0]

    at_opening = NativeRunner(plain, codec=make_codec(codec))
    stored = NativeRunner(ready)
    assert torch.equal(logits(stored), logits(at_opening))
    # Pages, the file's header, and vectors in float32 beside what they were read from.
    assert stored.resident_bytes <= at_opening.resident_bytes + 64 * 1024


def test_the_graph_runner_decodes_it(made, tmp_path):
    model, _ = made("qwen2_moe")
    packed(made, "qwen2_moe", tmp_path / "p", resident_codec="int8")
    codec = make_codec("int8")
    with torch.no_grad():
        decoded = build_tiny("qwen2_moe", config=model.config)
        for weight in linears(decoded).values():
            weight.copy_(codec.decode(codec.encode(weight)))
        ids = torch.tensor([[5, 9, 2, 40]])
        expected = decoded(ids).logits[0]
    with moekit.open_engine(tmp_path / "p", runner="graph") as engine:
        sequence = engine.runner.new_sequence(8)
        found = engine.runner.forward([sequence], [ids[0].tolist()], all_positions=True)[0]
    # float32 on both sides, sums in another order.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@native
def test_another_codec_is_refused_and_the_same_is_not(made, tmp_path):
    packed(made, "qwen2_moe", tmp_path / "p", resident_codec="int8")
    with moekit.open_engine(tmp_path / "p", resident_codec="int8") as engine:
        same = engine.generate([[5, 9]], 4)
    with moekit.open_engine(tmp_path / "p") as engine:
        assert engine.generate([[5, 9]], 4) == same
    with pytest.raises(UserError, match=r"is stored in int8: leave out resident_codec, or conv"):
        moekit.open_engine(tmp_path / "p", resident_codec="int4")


def test_a_header_has_the_least_version_that_describes_it(made, tmp_path):
    packed(made, "qwen2_moe", tmp_path / "plain")
    packed(made, "qwen2_moe", tmp_path / "encoded", resident_codec="int4")
    version = {
        name: json.loads((tmp_path / name / "packed.json").read_text())["version"]
        for name in ("plain", "encoded")
    }
    assert version == {"plain": 2, "encoded": 3}


def test_damage_is_found(made, tmp_path):
    packed(made, "qwen2_moe", tmp_path / "p", resident_codec="int4")
    header = tmp_path / "p" / "packed.json"
    content = json.loads(header.read_text())
    name = next(iter(content["encoded"]))

    def refused(message, **changes):
        header.write_text(json.dumps(content | changes))
        with pytest.raises(UserError, match=message):
            ExpertStore.open(tmp_path / "p")

    part = content["encoded"][name]
    refused("no codec method", resident_codec={"name": "int9", "group_size": 32})
    refused("is damaged: .*33 columns", encoded={name: part | {"shape": [64, 33]}})
    refused("is damaged", encoded={name: part | {"shape": [64]}})
    refused("is damaged", encoded={name: part | {"dtype": "Q4"}})
    refused("no resident tensor", encoded={"x": part})
    refused(f"{name} has .* bytes", encoded={name: part | {"shape": [part["shape"][0], 96]}})
    header.write_text(json.dumps(content))
    file = tmp_path / "p" / "resident.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    with ExpertStore.open(tmp_path / "p") as store:
        for whole in (False, True):
            with pytest.raises(StoreError, match="is damaged: its checksum"):
                list(store.resident_stored(whole=whole))


def test_what_no_codec_is(made, tmp_path):
    with pytest.raises(UserError, match="int9"):
        packed(made, "qwen2_moe", tmp_path / "p", resident_codec="int9")
    assert not (tmp_path / "p").exists()
