"""convert: equal to what transformers itself would load and save, for every family."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moekit.core import write_model as write_module
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.record import RunRecord
from tests.families.tiny import TINY, build_tiny, tiny_inputs

FAST = {
    *("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "jamba", "granitemoe", "phimoe"),
    *("lfm2_moe", "nemotron_h", "minimax_m2", "glm4_moe", "ernie4_5_moe", "qwen3_next", "llama4"),
    *("qwen3_vl_moe", "ernie4_5_vl_moe", "longcat_flash", "inkling2", "step3p7"),
}
FAMILIES = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY]

# transformers publishes these with fused banks, so "per-expert" has no other form.
FUSED_ONLY = {
    *(
        "aria",
        "dbrx",
        "diffusion_gemma",
        "doge",
        "gemma4",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
    ),
    *("granitemoehybrid", "granitemoeshared", "hy_v4", "inkling", "inkling2", "jetmoe"),
    *("llama4", "minimax_m3_vl", "mistral4", "muse_spark", "nllb_moe", "openai_privacy_filter"),
    *("qwen3_vl_moe", "step3p7", "switch_transformers", "zaya"),
}
RANDOM_FORWARD = {"diffusion_gemma"}


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a, b):
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def logits(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)[0]


def saved(model, path, **options):
    model.save_pretrained(path, **options)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_both_ways_and_copied(tmp_path, family):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model)
    sources = {
        "per-expert": saved(model, tmp_path / "o"),
        "fused": saved(model, tmp_path / "f", save_original_format=False),
    }
    expected = {layout: tensors_of(path) for layout, path in sources.items()}
    reference = logits(type(model).from_pretrained(sources["per-expert"]), inputs)
    for source in sources:
        for to in ("fused", "per-expert"):
            out = tmp_path / f"{source} {to}"
            result = convert(sources[source], out, to, max_shard_bytes=30_000)
            assert result.layout == ("fused" if family in FUSED_ONLY else to)
            assert result.source_layout == ("fused" if family in FUSED_ONLY else source)
            assert bool(result.notes) == (family in FUSED_ONLY and to == "per-expert")
            assert same(tensors_of(out), expected[to])
            assert result.bytes == sum(t.nbytes for t in expected[to].values())
            assert result.tensors == len(expected[to])
            if family not in RANDOM_FORWARD and source != to:
                # Loaders map the files; in ours tensors lie at other addresses, where kernels may
                # add in another order.
                got = logits(type(model).from_pretrained(out), inputs)
                assert torch.allclose(got, reference, atol=1e-5, rtol=1e-5)


def test_every_family_is_listed():
    assert not (FAST | FUSED_ONLY) - set(TINY)


def small(tmp_path, family="mixtral", dtype=torch.float32, **options):
    model = build_tiny(family, dtype=dtype)
    return model, saved(model, tmp_path / "model", **options)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "lfm2_moe", "nemotron_h"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_equals_loading_in_that_dtype(tmp_path, family, dtype):
    model, path = small(tmp_path, family)
    stock = type(model).from_pretrained(path, dtype=getattr(torch, dtype))
    expected = tensors_of(saved(stock, tmp_path / "stock", save_original_format=False))
    convert(path, tmp_path / "out", "fused", dtype=dtype)
    assert same(tensors_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert type(model).from_pretrained(tmp_path / "out").dtype == stock.dtype


def test_without_dtype_every_tensor_keeps_its_own(tmp_path):
    _, path = small(tmp_path, dtype=torch.bfloat16)
    values = tensors_of(path)
    name = next(n for n in values if n.endswith("gate.weight"))
    values[name] = values[name].double()
    save_file(values, path / "model.safetensors")
    convert(path, tmp_path / "out", "per-expert")
    assert same(tensors_of(tmp_path / "out"), values)


def test_side_files(tmp_path):
    _, path = small(tmp_path)
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        (path / name).write_text(f'{{"name": "{name}"}}')
    for name in ("pytorch_model.bin", "model.pt", "modeling_x.py", "weights.gguf", "x.index.json"):
        (path / name).write_text("no")
    (path / "record.json").write_text("{}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (path / "original").mkdir()
    notes = []
    result = convert(path, tmp_path / "out", note=notes.append)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/rag.jinja", "model.safetensors", "record.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "LICENSE").read_text() == '{"name": "LICENSE"}'
    assert notes == result.notes
    assert notes[0].startswith("Not copied: ")
    assert "modeling_x.py, pytorch_model.bin" in notes[0]
    convert(path, tmp_path / "code", copy_code=True)
    assert (tmp_path / "code" / "modeling_x.py").exists()
    assert not (tmp_path / "code" / "pytorch_model.bin").exists()


def test_record(tmp_path):
    _, path = small(tmp_path)
    result = convert(path, tmp_path / "out", "per-expert", dtype="bfloat16")
    record = RunRecord.load(tmp_path / "out")
    assert record.command == "convert"
    assert record.options["to"] == "per-expert"
    assert record.options["dtype"] == "bfloat16"
    assert [item.name for item in record.artefacts] == ["model.safetensors"]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert record.artefacts[0].bytes == size
    assert record.inputs[0].name == str(path / "model.safetensors")
    assert record.metrics["bytes"] == result.bytes


def test_checkpoint_of_the_base_model(tmp_path):
    """Weights saved without the prefix of the causal LM load and convert all the same."""
    model, _ = small(tmp_path)
    base = saved(model.model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralModel"]}))
    for to in ("fused", "per-expert"):
        convert(base, tmp_path / to, to)
        again = type(model.model).from_pretrained(tmp_path / to)
        assert same(again.state_dict(), model.model.state_dict())
    assert same(tensors_of(tmp_path / "per-expert"), tensors_of(base))


def test_tensors_that_the_class_does_not_use_are_kept(tmp_path):
    model, path = small(tmp_path)
    extra = {"model.layers.9.mtp.weight": torch.ones(3)}
    save_file(tensors_of(path) | extra, path / "model.safetensors")
    convert(path, tmp_path / "out", "fused")
    got = tensors_of(tmp_path / "out")
    assert torch.equal(got["model.layers.9.mtp.weight"], torch.ones(3))
    assert len(got) == len(model.state_dict()) + 1


def test_tied_weights_are_stored_once(tmp_path):
    config = TINY["mixtral"]()
    config.tie_word_embeddings = True
    model = build_tiny("mixtral", config=config)
    path = saved(model, tmp_path / "model")
    assert "lm_head.weight" not in tensors_of(path)
    convert(path, tmp_path / "out", "fused")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), model.state_dict())


def test_block_fp8_checkpoint_is_dequantised(tmp_path):
    model, path = small(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    values, expected = tensors_of(path), {}
    stored = {}
    for name, tensor in values.items():
        if ".experts." in name or name.endswith("o_proj.weight"):
            quantised = tensor.to(torch.float8_e4m3fn)
            grid = [-(-size // 16) for size in tensor.shape]
            scale = torch.rand(grid) + 0.5
            wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            wide = wide[: tensor.shape[0], : tensor.shape[1]]
            stored |= {name: quantised, name + "_scale_inv": scale}
            expected[name] = (quantised.float() * wide).bfloat16()
        else:
            stored[name] = expected[name] = tensor
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (path / "config.json").write_text(json.dumps(config))
    result = convert(path, tmp_path / "out", "per-expert")
    assert result.notes == ["Dequantised from fp8 to bfloat16."]
    got = tensors_of(tmp_path / "out")
    assert {n for n in got if got[n].dtype != torch.bfloat16} <= {
        n for n in got if n.endswith("e_score_correction_bias")
    }
    assert all(torch.equal(got[n].float(), expected[n].float()) for n in expected)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    fused = convert(path, tmp_path / "fused", "fused", dtype="float32")
    assert fused.layout == "fused"
    assert type(model).from_pretrained(tmp_path / "fused").dtype == torch.float32


def test_mxfp4_checkpoint_is_dequantised(tmp_path):
    config = TINY["gpt_oss"]()
    config.hidden_size = config.intermediate_size = 32
    model = build_tiny("gpt_oss", dtype=torch.bfloat16, config=config)
    path = saved(model, tmp_path / "model")
    stored = {}
    for name, tensor in tensors_of(path).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            stored[name + "_blocks"] = torch.randint(
                0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8
            )
            stored[name + "_scales"] = torch.randint(
                120, 130, (experts, outer, inner // 32), dtype=torch.uint8
            )
        else:
            stored[name] = tensor
    save_file(stored, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(raw))
    convert(path, tmp_path / "out", "fused")
    got = type(model).from_pretrained(tmp_path / "out")
    # transformers decodes such a checkpoint itself when it finds no GPU.
    stock = type(model).from_pretrained(path, dtype=torch.bfloat16)
    assert same(got.state_dict(), stock.state_dict())


def test_refusals_before_anything_is_written(tmp_path):
    _, path = small(tmp_path)
    cases = [
        ({"to": "gguf"}, "--to 'gguf' is no layout; there are fused and per-expert"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
        ({"out": path}, "overlaps the model"),
        ({"out": path / "sub"}, "overlaps the model"),
        ({"out": tmp_path}, "overlaps the model"),
        ({"model": tmp_path / "none"}, "is no directory with a model"),
        ({"plan": tmp_path / "none.json"}, "cannot be read"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            convert(**({"model": path, "out": tmp_path / "out"} | options))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        convert(path, tmp_path / "taken")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UserError, match="quantised with 'awq'"):
        convert(path, tmp_path / "out")
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 9}))
    with pytest.raises(UserError, match=r"\[8, .* the config says \[9, "):
        convert(path, tmp_path / "out")
    assert sorted(p for p in tmp_path.rglob("*") if "taken" not in str(p)) == before


def test_incomplete_and_damaged_checkpoints(tmp_path):
    _, path = small(tmp_path)
    values = tensors_of(path)
    shard = path / "model.safetensors"

    def refused(changed, message):
        save_file(changed, shard)
        with pytest.raises(UserError, match=message):
            convert(path, tmp_path / "out", "fused")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    def without(text):
        return {name: tensor for name, tensor in values.items() if text not in name}

    refused(without("layers.1.self_attn.q_proj"), "lacks 1 of .* first is model.layers.1.self_attn")
    refused(without("experts.3.w1"), "cannot be joined|has shape")
    refused(without("experts.3."), r"shape \[7, .* config says \[8, .* missing from the checkpoint")
    refused(without("layers.0.block_sparse_moe.experts"), "lacks 2 of .*layers.0.mlp.experts.down")
    odd = dict(values)
    name = next(n for n in odd if n.endswith("experts.2.w2.weight"))
    odd[name] = odd[name][:, :-1].contiguous()
    refused(odd, "cannot be joined to model.layers.*down_proj")
    save_file(values, shard)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(UserError, match="is truncated"):
        convert(path, tmp_path / "out")


def test_dry_run_writes_nothing(tmp_path):
    _, path = small(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = convert(path, tmp_path / "out", "fused", dry_run=True, max_shard_bytes=10_000)
    assert sorted(tmp_path.rglob("*")) == before
    real = convert(path, tmp_path / "out", "fused", max_shard_bytes=10_000)
    assert (result.bytes, result.tensors, result.shards) == (real.bytes, real.tensors, real.shards)
    assert result.shards > 1
    assert result.seconds == (result.bytes + result.source_bytes) / 200e6
    with pytest.raises(UserError, match="--overwrite"):
        convert(path, tmp_path / "out", "fused", dry_run=True)


def test_progress_and_overwrite(tmp_path):
    _, path = small(tmp_path)
    seen = []
    convert(path, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert totals == {sum(t.nbytes for t in tensors_of(path).values())}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    convert(path, tmp_path / "out", "fused", overwrite=True)
    assert any("gate_up_proj" in name for name in tensors_of(tmp_path / "out"))


SLOW = """
    import sys, time
    from moekit.core import writer, deferred
    from moekit.core.convert import convert
    writer.JOURNAL_BYTES = 1
    def progress(done, total):
        print(done, flush=True)
        time.sleep(float(sys.argv[3]))
    convert(sys.argv[1], sys.argv[2], "fused", progress=progress, note=lambda text: print(text))
"""


def run_slow(source, out, pause):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), str(source), str(out), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_conversion_resumes(tmp_path, kill):
    _, path = small(tmp_path, "qwen3_moe")
    expected = tmp_path / "expected"
    convert(path, expected, "fused")
    out = tmp_path / "out"
    process = run_slow(path, out, 0.2)
    for _ in range(4):
        assert process.stdout.readline()
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if kill == signal.SIGINT:
        assert "The same command resumes it; discard it with --restart" in errors
    assert not out.exists()
    shutil.copytree(tmp_path / "out.partial", tmp_path / "again.partial")
    assert convert(path, tmp_path / "again", "per-expert", restart=True).resumed_bytes == 0
    with pytest.raises(UserError, match="begun with to = 'fused', now it is 'per-expert'"):
        convert(path, out, "per-expert")
    config = path / "config.json"
    stamp = config.stat()
    os.utime(config, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(UserError, match="begun with files"):
        convert(path, out, "fused")
    os.utime(config, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    notes = []
    result = convert(path, out, "fused", note=notes.append)
    assert 0 < result.resumed_bytes < result.bytes
    assert "Resuming" in notes[0]
    assert same(tensors_of(out), tensors_of(expected))
    assert not (tmp_path / "out.partial").exists()


def test_source_that_changes_while_it_is_converted(tmp_path, monkeypatch):
    """A shard cut short in the middle is an error, never a crash or a finished output."""
    _, path = small(tmp_path)
    shard = path / "model.safetensors"
    original = write_module._write_tensors

    def cut(*arguments):
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        original(*arguments)

    monkeypatch.setattr(write_module, "_write_tensors", cut)
    with pytest.raises(UserError, match="became shorter"):
        convert(path, tmp_path / "out", "fused")
    assert not (tmp_path / "out").exists()
