"""--to compressed-tensors: read by transformers' own integration, and read back."""

import json

import pytest
import torch
from transformers.utils import logging

from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.new_experts import encode_expert
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan
from moekit.core.rewrite import Rewrite
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.export.compressed_tensors import convert_compressed_tensors, pack_words
from tests.core.test_convert import logits, same, saved
from tests.families.tiny import TINY, build_tiny, tiny_inputs

# Of the families with a layout of one tensor an expert: names of both kinds, groups, shared
# experts, no gate.
FAST = ("mixtral", "deepseek_v3", "nemotron_h")
FAMILIES = [
    *FAST,
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3_moe", "qwen2_moe", "minimax_m2")),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def wide(family, dtype=torch.float32):
    """Tiny, with matrices whose columns split into groups of 32."""
    config = TINY[family]()
    for name in ("moe_intermediate_size", "intermediate_size"):
        value = getattr(config, name, None)
        if value in (24, 48):
            setattr(config, name, {24: 32, 48: 64}[value])
    return build_tiny(family, config=config, dtype=dtype)


def read_by_transformers(path, family):
    pytest.importorskip("compressed_tensors")
    return type(build_tiny(family)).from_pretrained(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_dequantised_values(tmp_path, family, dtype):
    source = wide(family, dtype)
    path = saved(source, tmp_path / "model")
    convert_compressed_tensors(path, tmp_path / "out", codec="int4", group_size=32)
    convert(tmp_path / "out", tmp_path / "dense", "per-expert")
    dense = type(source).from_pretrained(tmp_path / "dense")
    loaded = read_by_transformers(tmp_path / "out", family)
    inputs = tiny_inputs(family, source)
    assert torch.equal(logits(loaded, inputs), logits(dense, inputs))
    assert not torch.equal(logits(dense, inputs), logits(source, inputs))


@pytest.mark.parametrize(("codec", "group"), [("int8", 32), ("int8", 0), ("int4", 0), ("int4", 32)])
def test_schemes(tmp_path, codec, group):
    source = wide("mixtral")
    path = saved(source, tmp_path / "model")
    convert_compressed_tensors(path, tmp_path / "out", codec=codec, group_size=group)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == ("group" if group else "channel")
    convert(tmp_path / "out", tmp_path / "dense", "fused")
    dense = type(source).from_pretrained(tmp_path / "dense")
    old, new = MoEView(source)[0].get_expert(3), MoEView(dense)[0].get_expert(3)
    levels = 7 if codec == "int4" else 127
    for name, part in new.tensors().items():
        before = old.tensors()[name]
        grouped = before.view(len(before), -1, group or before.shape[1])
        step = grouped.abs().amax(-1, keepdim=True) / levels
        # Half a step, and what the rounding of the scale to float16 moves.
        assert ((part.view_as(grouped) - grouped).abs() <= 0.501 * step + 1e-6).all()
    loaded = read_by_transformers(tmp_path / "out", "mixtral")
    assert same(loaded.state_dict(), dense.state_dict())


def test_words_are_packed_as_the_package_does():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 8):
        codes = torch.randint(0, 2**bits, (5, 44), generator=generator, dtype=torch.uint8)
        signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        expected = helpers.pack_to_int32(signed, bits)
        assert torch.equal(pack_words(codes, bits), expected)


class Encodes(Rewrite):
    """Halves an expert, then encodes it."""

    def __init__(self):
        self.identity = {"method": "halves"}
        self.codec = CodecChoice("int4", 32)

    def expert(self, layer, expert, members, read):
        old = read(expert)
        old.down = old.down / 2
        return encode_expert(old, self.codec.make())


def test_a_plan_and_values_that_a_rewrite_encoded(tmp_path):
    source = wide("qwen3_moe")
    path = saved(source, tmp_path / "model")
    layers = [layer.layer_index for layer in spec_of(source).per_layer]
    plan = ExpertPlan({i: {1: Action(drop=True), 4: Action(drop=True)} for i in layers})
    convert_compressed_tensors(path, tmp_path / "out", plan, rewrite=Encodes())
    convert(path, tmp_path / "fused", "fused", plan, rewrite=Encodes())
    loaded = read_by_transformers(tmp_path / "out", "qwen3_moe")
    dense = type(source).from_pretrained(tmp_path / "fused")
    assert spec_of(loaded).num_experts == 6
    # In float32 the codec's float16 scales are held exactly.
    inputs = tiny_inputs("qwen3_moe", source)
    assert torch.equal(logits(loaded, inputs), logits(dense, inputs))
    with pytest.raises(UserError, match="fitted to int4 in groups of 32"):
        convert_compressed_tensors(path, tmp_path / "x", plan, rewrite=Encodes(), codec="int8")


def bits_plan(**more):
    return ExpertPlan({i: {e: Action(bits=4) for e in range(8)} | more for i in range(3)})


@pytest.mark.parametrize(
    ("family", "plan", "options", "message"),
    [
        ("mixtral", None, {"codec": "int4-zp"}, "readers fail on zero points"),
        ("mixtral", None, {"codec": "int3"}, "holds the codecs int4 and int8, not int3"),
        ("mixtral", None, {"codec": "fp32"}, "not fp32"),
        ("mixtral", None, {"group_size": 48}, "--group-size 48 is not one of 0"),
        ("mixtral", None, {"group_size": 128}, "do not split into groups of 128"),
        ("mixtral", ExpertPlan({0: {1: Action(bits=4)}}), {}, "expert 0 of layer 0 bits none"),
        ("mixtral", ExpertPlan({0: {0: Action(bits=8)}}), {}, "expert 0 of layer 0 bits 8.*one"),
        ("gpt_oss", None, {}, "gpt_oss is published with fused banks"),
        ("kimi_linear", None, {}, "cannot load compressed experts of kimi_linear"),
        ("longcat_flash", None, {}, "stores 64 matrices .* of which 48 are of its routed ones"),
    ],
)
def test_what_the_format_does_not_hold(tmp_path, family, plan, options, message):
    path = saved(wide(family), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        convert_compressed_tensors(path, tmp_path / "out", plan, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_other_schemes_are_refused_when_reading(tmp_path):
    path = saved(wide("mixtral"), tmp_path / "model")
    convert_compressed_tensors(path, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="one symmetric scheme of packed integers"):
        convert(tmp_path / "out", tmp_path / "dense", "fused")
