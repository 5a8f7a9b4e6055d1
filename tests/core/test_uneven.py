"""Layers that keep different numbers of experts, alias tables and widths: packed and stock."""

import pytest
import torch
from transformers.utils import logging

from moekit.compress import apply_live
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.layout import with_num_experts
from moekit.core.new_experts import encode_expert
from moekit.core.pack import pack
from moekit.core.packed import CodecChoice
from moekit.core.packed_header import PackedHeader
from moekit.core.plan import Action, ExpertPlan
from moekit.core.rewrite import Rewrite
from moekit.core.spec import spec_from_config, spec_of
from moekit.core.view import MoEView
from moekit.runtime.store import ExpertStore
from moekit.runtime.unpack import load_packed
from tests.core.test_convert import logits, saved
from tests.families.tiny import TINY, build_tiny, tiny_inputs


def slow(family):
    return pytest.param(family, marks=pytest.mark.slow)


# Correction bias, correction bias and groups, bias in the logits, softmax normalised afterwards.
BARRED = ("lfm2_moe", "deepseek_v3", "gpt_oss", slow("ernie4_5_moe"), slow("glm4_moe"))


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def large(family):
    return build_tiny(family, config=with_num_experts(TINY[family](), 16))


def uneven_plan(spec):
    """Layer after layer loses one expert more of every group."""
    layers = {}
    for number, layer in enumerate(spec.per_layer):
        size = layer.num_experts // layer.num_groups
        gone = [g * size + i for g in range(layer.num_groups) for i in range(number % 3)]
        layers[layer.layer_index] = dict.fromkeys(gone, Action(drop=True))
    return ExpertPlan(layers)


@pytest.mark.parametrize("family", BARRED)
def test_dead_experts_are_never_chosen(tmp_path, family):
    source = large(family)
    path = saved(source, tmp_path / "model")
    plan = uneven_plan(spec_of(source))
    result = convert(path, tmp_path / "out", "fused", plan)
    assert any("dead ones" in note for note in result.notes)
    assert len(set(result.experts.values())) > 1
    inputs = tiny_inputs(family, source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    written = type(source).from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(written, inputs), live, atol=1e-4)
    assert (live - logits(source, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", slow("qwen3_moe"), "longcat_flash", slow("phimoe")])
def test_routers_without_a_bias_hold_different_numbers_packed_only(tmp_path, family):
    source = large(family)
    path = saved(source, tmp_path / "model")
    plan = uneven_plan(spec_of(source))
    with pytest.raises(UserError, match="has no bias by which to keep dead experts"):
        convert(path, tmp_path / "out", "fused", plan)
    assert not (tmp_path / "out").exists()
    pack(path, tmp_path / "packed", plan, codec="fp32")
    assert_packed_equals_live(tmp_path / "packed", source, plan, family)


def assert_packed_equals_live(path, source, plan, family):
    inputs = tiny_inputs(family, source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    loaded = load_packed(path)
    counts = [len(plan.survivors(x.layer_index, x.num_experts)) for x in spec_of(source).per_layer]
    assert [layer.num_experts for layer in MoEView(loaded.model)] == counts
    assert [layer.num_experts for layer in spec_from_config(path).per_layer] == counts
    assert torch.allclose(logits(loaded.model, inputs), live, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", slow("nemotron_h"), slow("llama4")])
def test_packed_holds_the_real_numbers(tmp_path, family):
    source = large(family)
    path = saved(source, tmp_path / "model")
    plan = uneven_plan(spec_of(source))
    result = pack(path, tmp_path / "packed", plan, codec="fp32")
    assert not result.notes
    assert_packed_equals_live(tmp_path / "packed", source, plan, family)


def test_an_alias_table_shares_one_record(tmp_path):
    source = build_tiny("mixtral")
    path = saved(source, tmp_path / "model")
    members = {1: Action(group=1, weight=0.5), 3: Action(group=1, weight=0.5)}
    plan = ExpertPlan(dict.fromkeys(range(3), members), routers=dict.fromkeys(range(3), "alias"))
    whole = pack(path, tmp_path / "whole", codec="fp32")
    result = pack(path, tmp_path / "packed", plan, codec="fp32")
    assert result.tensors == whole.tensors - 3
    header = PackedHeader.read(tmp_path / "packed")
    assert header.layers[0].record_of == (0, 1, 2, 1, 4, 5, 6, 7)
    inputs = tiny_inputs("mixtral", source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    loaded = load_packed(tmp_path / "packed")
    assert torch.allclose(logits(loaded.model, inputs), live, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "width"), [("qwen3_moe", 16), ("gpt_oss", 32), ("deepseek_v3", 24), ("dbrx", 24)]
)
def test_cut_neurons_leave_the_config_where_it_can_say_so(tmp_path, family, width):
    source = build_tiny(family)
    path = saved(source, tmp_path / "model")
    spec = spec_of(source)
    cut = {e: Action(width=13 if e else 16 if family != "gpt_oss" else 32) for e in range(8)}
    plan = ExpertPlan({layer.layer_index: cut for layer in spec.per_layer})
    result = convert(path, tmp_path / "out", "per-expert", plan)
    written = type(source).from_pretrained(tmp_path / "out")
    assert {layer.expert_width for layer in spec_of(written).per_layer} == {width}
    says_zeros = any("neurons that are cut are written as zeros" in n for n in result.notes)
    assert says_zeros == (width == spec.expert_width)
    inputs = tiny_inputs(family, source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    assert torch.allclose(logits(written, inputs), live, atol=1e-4)


def test_packed_layers_have_their_own_widths(tmp_path):
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size = 96
    source = build_tiny("qwen3_moe", config=config)
    path = saved(source, tmp_path / "model")
    widths = {1: 20, 2: 64}
    plan = ExpertPlan({i: {e: Action(width=w) for e in range(8)} for i, w in widths.items()})
    pack(path, tmp_path / "packed", plan, codec="bf16")
    header = PackedHeader.read(tmp_path / "packed")
    sizes = [layer.matrices[0].shape[0] for layer in header.layers]
    assert sizes[:2] == [32, 64]
    inputs = tiny_inputs("qwen3_moe", source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    loaded = load_packed(tmp_path / "packed")
    # The records are in bfloat16: 8 bits of mantissa.
    assert torch.allclose(logits(loaded.model, inputs), live, atol=0.1)


class Encodes(Rewrite):
    """Encodes a halved expert by the codec that the packed model shall have."""

    def __init__(self, codec):
        self.identity = {"method": "encodes", "codec": codec.name}
        self.codec = codec

    def expert(self, layer, expert, members, read):
        old = read(expert)
        old.down = old.down / 2
        return encode_expert(old, self.codec.make())


def test_what_a_rewrite_encoded_is_packed_as_it_is(tmp_path):
    config = TINY["mixtral"]()
    config.intermediate_size = 64
    source = build_tiny("mixtral", config=config)
    path = saved(source, tmp_path / "model")
    codec = CodecChoice("int4-zp", 32)
    plan = ExpertPlan({i: {3: Action(drop=True)} for i in range(3)})
    pack(path, tmp_path / "packed", plan, rewrite=Encodes(codec))
    with ExpertStore.open(tmp_path / "packed") as store:
        assert {c for layer in store.layers for c in layer.codecs} == {codec}
        old = MoEView(source)[1].get_expert(4)
        found = store.read(1, 3).matrices["down"].planes[0]
        for name, array in codec.make().encode(old.down / 2).planes[0].items():
            assert torch.equal(found[name], array)
    with pytest.raises(UserError, match="fitted to int4-zp in groups of 32"):
        pack(path, tmp_path / "x", plan, rewrite=Encodes(codec), codec="int8")
    # Other arrays than those of the codec that the header names.
    wrong = Encodes(codec)
    wrong.expert = lambda *_: encode_expert(old, CodecChoice("int8", 32).make())
    with pytest.raises(UserError, match="was encoded otherwise than --codec int4-zp does"):
        pack(path, tmp_path / "y", plan, rewrite=wrong)
