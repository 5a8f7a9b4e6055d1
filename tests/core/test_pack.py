"""pack: every expert comes back as its codec makes it, and the rest bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.core import writer as writer_module
from moekit.core.errors import UserError
from moekit.core.memory import PeakMemory
from moekit.core.pack import pack
from moekit.core.packed_header import PackedHeader
from moekit.core.plan import Action, ExpertPlan
from moekit.core.record import RunRecord
from moekit.core.view import MoEView
from moekit.core.writer import CheckpointWriter
from moekit.ops import native
from moekit.ops.codecs import make_codec
from moekit.runtime.store import ExpertStore
from tests.families.tiny import TINY, build_tiny

FAST = {
    *("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "dbrx", "jetmoe", "switch_transformers"),
    *("llama4", "granitemoe", "aria"),
}
# Its encoder and its decoder have the same experts.
SHARED = "diffusion_gemma"
FAMILIES = [
    f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY if f != SHARED
]


def wide(family="mixtral", dtype=torch.float32):
    """A tiny model whose experts have widths that groups of 32 divide."""
    config = TINY[family]()
    for name in ("moe_intermediate_size", "intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, 64)
    return build_tiny(family, dtype=dtype, config=config)


def saved(model, path, **options):
    model.save_pretrained(path, **options)
    return path


def check(store, model, codec_of):
    """Every expert and every resident tensor of the store against the model."""
    view = MoEView(model)
    assert len(store.layers) == len(view)
    for position, layer in enumerate(view):
        assert store.layers[position].path == layer.name
        assert store.layers[position].num_experts == layer.num_experts
        for e in range(layer.num_experts):
            parts, codec = store.read(position, e), codec_of(position, e)
            expected = layer.get_expert(e).tensors()
            assert [*parts.matrices, *parts.vectors] == list(expected)
            for name, encoded in parts.matrices.items():
                again = codec.decode(codec.encode(expected[name]))
                assert torch.equal(parts.codec.decode(encoded), again)
            for name, vector in parts.vectors.items():
                assert torch.equal(vector, expected[name])
    state = model.state_dict()
    resident = dict(store.resident())
    assert all(torch.equal(tensor, state[name]) for name, tensor in resident.items())
    return state, resident


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    model = build_tiny(family)
    pack(saved(model, tmp_path / "m"), tmp_path / "out", codec="fp32")
    with ExpertStore.open(tmp_path / "out") as store:
        state, resident = check(store, model, lambda *_: make_codec("fp32"))
    experts = [layer.get_expert(e) for layer in MoEView(model) for e in range(layer.num_experts)]
    routed = sum(part.numel() for expert in experts for part in expert.tensors().values())
    # Nothing is left out and nothing is kept twice; a tied tensor is stored under one name.
    unique = {t.data_ptr(): t.numel() for t in state.values() if t.numel()}
    # longcat_flash has rows in one bank for its experts without weights, which nothing reads.
    rows = sum(
        bank[layer.num_experts :].numel()
        for layer in MoEView(model)
        for name, bank in layer.experts.named_parameters(recurse=False)
        if name == "gate_up_proj" and bank.ndim == 3
    )
    assert sum(t.numel() for t in resident.values()) + routed == sum(unique.values()) - rows
    assert not rows or family == "longcat_flash"


def test_shared_experts_are_refused_by_name(tmp_path):
    path = saved(build_tiny(SHARED), tmp_path / "m")
    with pytest.raises(UserError, match=r"encoder.*experts.*layers share their experts"):
        pack(path, tmp_path / "out", codec="fp32")


@pytest.mark.parametrize("codec", ["bf16", "int4", "int4-zp", "int3", "ternary", "nested4"])
@pytest.mark.parametrize("fused", [False, True])
def test_codecs(tmp_path, codec, fused):
    model = wide("gpt_oss" if fused else "qwen3_moe", torch.bfloat16)
    path = saved(model, tmp_path / "m", save_original_format=not fused)
    result = pack(path, tmp_path / "out", codec=codec)
    files = list((tmp_path / "out").glob("*.safetensors"))
    data = [load_file(file) for file in files]
    assert result.bytes == sum(t.nbytes for part in data for t in part.values())
    assert result.tensors == sum(map(len, data))
    with ExpertStore.open(tmp_path / "out") as store:
        check(store, model, lambda *_: make_codec(codec))
        for position, layer in enumerate(store.layers):
            for e in range(layer.num_experts):
                exact = sum(
                    store.layers[0].codecs[0].make().nbytes(m.shape) for m in layer.matrices
                )
                planes = store.num_planes(position, e)
                # Header, gaps between arrays, and the rest of the last page.
                assert exact < store.nbytes(position, e) < exact + 8192 * planes
                assert store.nbytes(position, e) % 4096 == 0


def test_records_lie_at_pages(tmp_path):
    from moekit.core.checkpoint import read_header

    model = wide()
    pack(saved(model, tmp_path / "m"), tmp_path / "out", codec="nested3", max_shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("experts-*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert all(entry.start % 4096 == 0 for entry in read_header(file).values())
    with ExpertStore.open(tmp_path / "out") as store:
        check(store, model, lambda *_: make_codec("nested3"))


def test_plan_sets_bits_and_drops(tmp_path):
    model = wide()
    experts = {0: Action(drop=True), 1: Action(bits=8), 3: Action(bits=16), 4: Action(bits=2)}
    layers = {layer.index: dict(experts) for layer in MoEView(model)}
    plan = ExpertPlan(layers)
    path = saved(model, tmp_path / "m")
    result = pack(path, tmp_path / "out", plan, codec="int4-zp", group_size=64 // 2)
    assert set(result.experts.values()) == {(8, 7)}
    names = ["int8-zp", "int4-zp", "bf16", "int2-zp", *["int4-zp"] * 3]
    with ExpertStore.open(tmp_path / "out") as store:
        for position, layer in enumerate(MoEView(model)):
            assert [choice.name for choice in store.layers[position].codecs] == names
            for e, name in enumerate(names):
                codec, original = make_codec(name), layer.get_expert(e + 1)
                got = store.read(position, e)
                for part in ("gate", "up", "down"):
                    expected = codec.decode(codec.encode(getattr(original, part)))
                    assert torch.equal(got.codec.decode(got.matrices[part]), expected)
    with pytest.raises(UserError, match=r"asks for 5 bits, and there is no codec 'int5'"):
        pack(path, tmp_path / "x", ExpertPlan({0: {0: Action(bits=5)}}))
    nested = ExpertPlan({0: {0: Action(bits=2), 1: Action(bits=3)}})
    pack(path, tmp_path / "n", nested, codec="nested4")
    with ExpertStore.open(tmp_path / "n") as store:
        chosen = [choice.name for choice in store.layers[0].codecs]
        assert chosen == ["int2-zp", "nested3", *["nested4"] * 6]


def test_from_block_fp8(tmp_path):
    model = wide("deepseek_v3", torch.bfloat16)
    path = saved(model, tmp_path / "m")
    stored, decoded = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".experts." in name and tensor.ndim == 2:
            small = tensor.to(torch.float8_e4m3fn)
            scale = torch.rand([-(-size // 16) for size in tensor.shape]) + 0.5
            grid = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            stored |= {name: small, name + "_scale_inv": scale}
            decoded[name] = (small.float() * grid).bfloat16()
        else:
            stored[name] = decoded[name] = tensor
    save_file(decoded, path / "model.safetensors", {"format": "pt"})
    plain = type(model).from_pretrained(path)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (path / "config.json").write_text(json.dumps(config))
    result = pack(path, tmp_path / "out", codec="int8")
    assert result.notes == ["Dequantised from fp8 to bfloat16."]
    with ExpertStore.open(tmp_path / "out") as store:
        check(store, plain, lambda *_: make_codec("int8"))


def test_refusals(tmp_path):
    path = saved(build_tiny("qwen3_moe"), tmp_path / "m")
    with pytest.raises(UserError, match=r"--codec int4 .*down of the experts.* 24 columns"):
        pack(path, tmp_path / "out")
    with pytest.raises(UserError, match="no codec method is named 'int5'"):
        pack(path, tmp_path / "out", codec="int5")
    with pytest.raises(UserError, match="group size 16"):
        pack(path, tmp_path / "out", group_size=16)
    with pytest.raises(UserError, match="--dtype 'int8' is unknown"):
        pack(path, tmp_path / "out", dtype="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_not_finite_weights_are_named(tmp_path):
    model = wide()
    view = MoEView(model)
    weights = view[1].get_expert(2)
    weights.down[1, 1] = torch.nan
    view[1].set_expert(2, weights)
    path = saved(model, tmp_path / "m")
    with pytest.raises(UserError, match=r"expert 2, down: 1 of the weights .* NaN or infinite"):
        pack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_packing_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    path = saved(wide(), tmp_path / "m")
    pack(path, tmp_path / "whole", codec="nested4")
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 1)
    written = []
    original = CheckpointWriter.write_rows

    def write_rows(*arguments):
        original(*arguments)
        written.append(arguments)
        if len(written) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_rows", write_rows)
    with pytest.raises(KeyboardInterrupt):
        pack(path, tmp_path / "out", codec="nested4")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="begun with codec = 'nested4', now it is 'int4'"):
        pack(path, tmp_path / "out", codec="int4")
    with pytest.raises(UserError, match="no packed model"):
        ExpertStore.open(tmp_path / "out.partial")
    result = pack(path, tmp_path / "out", codec="nested4")
    assert result.resumed_bytes > 0
    for file in (tmp_path / "whole").iterdir():
        if file.name != "record.json":
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_full_disk_leaves_nothing_that_opens(tmp_path, monkeypatch):
    import errno
    import os

    path, out = saved(wide(), tmp_path / "m"), tmp_path / "out"
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match=r"disk of .* is full after .* run the same command"):
        pack(path, out)
    monkeypatch.undo()
    assert not out.exists()
    pack(path, out)
    with ExpertStore.open(out) as store:
        assert store.expert_bytes > 0


def test_dry_run_and_record(tmp_path):
    path = saved(wide(), tmp_path / "m")
    dry = pack(path, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    real = pack(path, tmp_path / "out")
    assert (dry.bytes, dry.tensors, dry.shards) == (real.bytes, real.tensors, real.shards)
    assert real.layout == "packed"
    record = RunRecord.load(tmp_path / "out")
    assert record.options["codec"] == "int4"
    names = [artefact.name for artefact in record.artefacts]
    assert names == ["resident.safetensors", "experts.safetensors"]
    pack(path, tmp_path / "out", overwrite=True, codec="int8")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for layers in (2, 6):
        config = TINY["mixtral"]()
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1024, layers
        path = saved(build_tiny("mixtral", torch.bfloat16, config=config), tmp_path / f"m{layers}")
        with PeakMemory() as memory:
            pack(path, tmp_path / f"out{layers}")
        peaks.append(memory.above_start)
    # Each further layer has 25 MB of experts.
    assert peaks[1] < peaks[0] + 25e6


def test_ternary_codes_of_an_older_order_are_refused(tmp_path):
    pack(saved(wide(), tmp_path / "m"), tmp_path / "p", codec="ternary", group_size=32)
    path = tmp_path / "p" / "packed.json"
    content = json.loads(path.read_text())
    assert content.pop("ternary_order") == 2
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="older order; convert the model again"):
        PackedHeader.read(tmp_path / "p")


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_the_kernels_write_the_bytes_that_torch_writes(tmp_path, monkeypatch, codec):
    # gpt_oss has biases too.
    source = saved(wide("gpt_oss", torch.bfloat16), tmp_path / "model")
    pack(source, tmp_path / "kernels", codec=codec)
    monkeypatch.setattr(native, "library", lambda: None)
    pack(source, tmp_path / "torch", codec=codec)
    names = sorted(file.name for file in (tmp_path / "torch").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "kernels" / name).read_bytes() == (
            tmp_path / "torch" / name
        ).read_bytes()
