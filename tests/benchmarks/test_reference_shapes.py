"""Packed models with random weights: sound, of the size of their shape, and all different."""

import pytest
import torch

from benchmarks.reference_shapes import ENCODED, SHAPES, config_of, write_packed
from moekit.core.spec import MoESpec
from moekit.ops.codecs import make_codec
from moekit.runtime.store import ExpertStore
from tests.families.tiny import TINY


@pytest.mark.parametrize("codec", ["int4", "nested4", "bf16"])
def test_a_small_shape_is_a_whole_packed_model(tmp_path, codec):
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size = 64
    out = write_packed(config, tmp_path / "packed", codec)
    with ExpertStore.open(out) as store:
        names = {name for name, _ in store.resident()}
        assert {"lm_head.weight", "model.layers.1.mlp.gate.weight"} <= names
        layer = store.layers[0]
        experts = [store.read(0, e) for e in range(layer.num_experts)]
        ups = [parts.codec.decode(parts.matrices["up"]) for parts in experts]
        assert all(up.shape == (64, 32) for up in ups)
        assert not any(torch.equal(a, b) for i, a in enumerate(ups) for b in ups[:i])
        # The variance of 1 / inputs, as far as 64 * 32 weights tell it.
        assert torch.stack(ups).var() * 32 == pytest.approx(1, rel=0.1)


def test_the_resident_part_can_be_encoded(tmp_path):
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size = 64
    plain = write_packed(config, tmp_path / "plain")
    made = write_packed(config, tmp_path / "encoded", resident_codec="int8")
    codec = make_codec("int8")
    with ExpertStore.open(plain) as one, ExpertStore.open(made) as two:
        found = dict(two.resident())
        assert set(two.header.encoded.matrices) == {n for n in found if n.endswith(ENCODED)}
        for name, tensor in one.resident():
            if name.endswith(ENCODED):
                tensor = codec.decode(codec.encode(tensor), torch.bfloat16)
            assert torch.equal(found[name], tensor)


def test_shapes_have_the_sizes_that_are_said_of_them():
    sizes = {name: MoESpec.from_config(config_of(name)).total_params for name in SHAPES}
    assert sizes == {
        "r1": pytest.approx(1.3e9, rel=0.03),
        "r2": pytest.approx(30.5e9, rel=0.01),
    }
