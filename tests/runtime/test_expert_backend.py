"""Experts computed from records: the model's own result, whatever is in memory at first."""

import pytest
import torch

from moekit.core.architecture import read_config
from moekit.core.pack import pack
from moekit.core.view import MoEView
from moekit.ops import native
from moekit.runtime.expert_backend import ExpertBackend
from moekit.runtime.native_experts import NativeExperts, activation_of
from moekit.runtime.resident import resident_model
from moekit.runtime.store import ExpertStore, StoreError
from moekit.runtime.torch_experts import TorchExperts
from tests.families.tiny import TINY, build_tiny
from tests.runtime.sources import StoreSource

# Adapters, biases, no gate, transposed, a norm after the experts, identity experts.
FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "dbrx", "llama4", "jetmoe", "longcat_flash"]


def packed(path, family="qwen3_moe", codec="fp32", dtype=torch.float32, **changes):
    """The tiny model of a family, and the store of what it was packed to."""
    config = TINY[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = build_tiny(family, dtype=dtype, config=config)
    model.save_pretrained(path / "m")
    pack(path / "m", path / "out", codec=codec)
    return model, ExpertStore.open(path / "out")


def logits(store, source, ids, dtype=None):
    model = resident_model(store, read_config(store.path), dtype)
    with torch.inference_mode(), ExpertBackend(model, store.layers, source) as backend:
        return model(ids).logits, backend


IDS = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", [True, False])
def test_computes_what_the_model_does(tmp_path, monkeypatch, family, kernels):
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    model, store = packed(tmp_path, family)
    out, backend = logits(store, StoreSource(store), IDS)
    plain = {"qwen3_moe", "gpt_oss", "nemotron_h"}
    native_ones = kernels and family in plain and native.library() is not None
    expected = NativeExperts if native_ones else TorchExperts
    assert all(type(experts) is expected for experts in backend._experts)
    with torch.inference_mode():
        # Sums in another order, over three layers.
        torch.testing.assert_close(out, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("codec", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int4", None)]
)
@pytest.mark.parametrize("kernels", [True, False])
def test_same_bits_in_whatever_order_they_come(tmp_path, monkeypatch, codec, dtype, kernels):
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    wide = {"moe_intermediate_size": 64}
    _, store = packed(tmp_path, codec=codec, dtype=dtype or torch.bfloat16, **wide)
    whole, _ = logits(store, StoreSource(store), IDS)
    for ready, portion in ((0, 1), (1, 2), (0, 100)):
        out, _ = logits(store, StoreSource(store, ready, portion), IDS)
        assert torch.equal(out, whole)


def test_model_keeps_its_own_experts(tmp_path):
    _, store = packed(tmp_path)
    model = resident_model(store, read_config(store.path))
    with ExpertBackend(model, store.layers, StoreSource(store)):
        view = MoEView(model)
        assert [layer.num_experts for layer in view] == [8] * len(view)
        assert all(layer.experts.down_proj.is_meta for layer in view)
    assert "forward" not in view[0].experts.__dict__


def test_damage_stops_the_forward(tmp_path):
    _, store = packed(tmp_path)
    file = store.path / store.header.expert_files[0]
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        logits(store, StoreSource(store), torch.arange(3, 120)[None])


def test_resident_part_must_be_complete(tmp_path):
    _, store = packed(tmp_path)
    kept = dict(store.resident())
    gate = next(name for name in kept if name.endswith("gate.weight"))
    del kept[gate]
    store.resident = lambda: iter(kept.items())
    with pytest.raises(StoreError, match=rf"{gate} is missing"):
        resident_model(store, read_config(store.path))


def test_gate_functions_are_told_apart():
    # A limit of 7 on gate and up, an odd function, no gate, and the usual one.
    found = {f: activation_of(MoEView(build_tiny(f))[0].experts) for f in ("gpt_oss", "hy_v4")}
    assert found == {"gpt_oss": ("clamped_swiglu", pytest.approx(1.702), 7.0), "hy_v4": None}
    assert activation_of(MoEView(build_tiny("nemotron_h"))[0].experts)[0] == "relu2"
    assert activation_of(MoEView(build_tiny("mixtral"))[0].experts)[0] == "silu"
