"""load_packed: the model that was packed, with what the codec left of its experts."""

import pytest
import torch

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.view import MoEView
from moekit.ops.codecs import make_codec
from moekit.runtime import unpack
from moekit.runtime.unpack import load_packed
from tests.families.tiny import build_tiny


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "dbrx", "jetmoe", "doge", "switch_transformers"]
)
def test_fp32_gives_the_model_back(tmp_path, family):
    model = build_tiny(family)
    model.save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "out", codec="fp32")
    loaded = load_packed(tmp_path / "out")
    expected, state = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert loaded.spec.model_type == model.config.model_type


def test_codec_is_decoded(tmp_path):
    model = build_tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "out", codec="bf16")
    codec = make_codec("bf16")
    for layer, packed in zip(
        MoEView(model), MoEView(load_packed(tmp_path / "out").model), strict=True
    ):
        for name, matrix in layer.get_expert(3).tensors().items():
            assert torch.equal(
                packed.get_expert(3).tensors()[name], codec.decode(codec.encode(matrix))
            )


def test_refusals(tmp_path, monkeypatch):
    build_tiny("qwen3_moe").save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "out", codec="fp32")
    with pytest.raises(UserError, match="open_engine"):
        moekit.load(tmp_path / "out")
    monkeypatch.setattr(unpack, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"1\.00 kB are left"):
        load_packed(tmp_path / "out")
