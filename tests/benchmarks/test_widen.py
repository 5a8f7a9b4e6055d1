"""Widened experts: another number of bytes, the same function."""

import json

import pytest
import torch

import moekit
from benchmarks.widen import widen
from moekit.core.checkpoint import Checkpoint
from moekit.core.errors import UserError
from moekit.core.seam import observe
from tests.families.tiny import build_tiny


def routed(model, ids):
    """The chosen experts of all layers, [L, T, K]."""
    seen = []
    with torch.no_grad(), observe(moekit.MoEView(model), seen.append):
        model(ids)
    return torch.stack([call.ids for call in seen])


def test_function_and_routing_stay(tmp_path):
    build_tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    done = widen(tmp_path / "model", tmp_path / "wide", 96)
    before, after = (moekit.load(tmp_path / name) for name in ("model", "wide"))
    assert {layer.expert_width for layer in after.spec.per_layer} == {96}
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        one, two = (loaded.model(ids).logits for loaded in (before, after))
    # Sums of the same terms and zeros, in an order that may depend on the width.
    assert (one - two).abs().max() < 1e-5
    assert torch.equal(routed(before.model, ids), routed(after.model, ids))
    with Checkpoint(tmp_path / "wide") as wide:
        assert done.bytes == wide.nbytes


def test_added_neurons(tmp_path):
    build_tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        widen(tmp_path / "model", tmp_path / name, 2048, seed=seed, max_shard_bytes=10**6)
    stem = "model.layers.1.mlp.experts.3."
    with Checkpoint(tmp_path / "model") as old, Checkpoint(tmp_path / "a") as new:
        gate, down = old.get(stem + "gate_proj.weight"), old.get(stem + "down_proj.weight")
        wide, zero = new.get(stem + "gate_proj.weight"), new.get(stem + "down_proj.weight")
        other = new.get(stem + "up_proj.weight")
    width = len(gate)
    assert torch.equal(wide[:width], gate)
    assert torch.equal(zero[:, :width], down)
    assert not zero[:, width:].any()
    assert wide[width:].std() == pytest.approx(float(gate.std()), rel=0.02)
    assert not torch.equal(wide[width:], other[width:])
    shards = [
        [(tmp_path / name / file.name).read_bytes() for file in (tmp_path / "a").glob("*.safet*")]
        for name in "abc"
    ]
    assert shards[0] == shards[1]
    assert shards[0] != shards[2]


def test_refused(tmp_path):
    build_tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    with pytest.raises(UserError, match=f"already have {config['moe_intermediate_size']}"):
        widen(tmp_path / "model", tmp_path / "out", 4)
    build_tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UserError, match="no moe_intermediate_size"):
        widen(tmp_path / "mixtral", tmp_path / "out", 4096)
    build_tiny("deepseek_v3").save_pretrained(tmp_path / "deepseek_v3")
    with pytest.raises(UserError, match="shared_experts"):
        widen(tmp_path / "deepseek_v3", tmp_path / "out", 4096)
