import json
import os
import shutil

import pytest
import torch

from moekit.core.load import load
from moekit.core.plan import Action, ExpertPlan
from moekit.core.record import RunRecord
from moekit.core.writer import CheckpointWriter


def logits(path):
    model = load(path).model
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_both_ways(moekit, tiny, tmp_path):
    fused, back = tmp_path / "fused", tmp_path / "back"
    done = moekit("convert", tiny, fused, "--to", "fused", "--max-shard-size", "100kB")
    assert done.code == 0
    assert done.out.startswith(f"wrote {fused}: ")
    assert "fused from per-expert" in done.out
    result = moekit("convert", fused, back, "--to", "per-expert", "--json").json
    assert (result["source_layout"], result["layout"]) == ("fused", "per-expert")
    assert result["out"] == str(back)
    assert result["shards"] == 1
    assert len(list(fused.glob("*.safetensors"))) > 1
    assert torch.allclose(logits(tiny), logits(fused), atol=1e-5)
    assert torch.allclose(logits(tiny), logits(back), atol=1e-5)
    assert load(fused).tokenizer.decode([65]) == load(tiny).tokenizer.decode([65])
    assert RunRecord.load(back).options["to"] == "per-expert"


def test_plan(moekit, refused, tiny, tmp_path):
    plan = tmp_path / "plan.json"
    ExpertPlan({i: {1: Action(drop=True)} for i in range(2)}).save(plan)
    dry = moekit("convert", tiny, tmp_path / "out", "--to", "fused", "--plan", plan, "--dry-run")
    assert dry.out.splitlines()[0].split()[:3] == ["layer", "experts", "drop"]
    assert f"would write {tmp_path / 'out'}" in dry.out
    assert "experts per layer: 3 of 4 in 2 layers" in dry.out
    assert not (tmp_path / "out").exists()
    args = ("convert", tiny, tmp_path / "out", "--to", "per-expert", "--plan", plan)
    result = moekit(*args, "--dtype", "bfloat16", "--json").json
    assert result["experts"] == {"0": [4, 3], "1": [4, 3]}
    loaded = load(tmp_path / "out")
    assert loaded.spec.num_experts == 3
    assert loaded.model.dtype == torch.bfloat16
    ExpertPlan({0: {1: Action(drop=True)}}).save(plan)
    message = refused("convert", tiny, tmp_path / "x", "--to", "fused", "--plan", plan)
    assert "4 in layer 1" in message


def test_packed_with_a_resident_codec(moekit, refused, tiny, tmp_path):
    args = ("convert", tiny, tmp_path / "out", "--to", "packed", "--codec", "bf16")
    dry = moekit(*args, "--dry-run", "--json").json
    result = moekit(*args, "--resident-codec", "int8", "--json").json
    assert result["bytes"] < dry["bytes"]
    header = json.loads((tmp_path / "out" / "packed.json").read_text())
    assert header["resident_codec"] == {"name": "int8", "group_size": 32}
    assert "model.layers.0.self_attn.q_proj.weight" in header["encoded"]
    message = refused("convert", tiny, tmp_path / "x", "--to", "fused", "--resident-codec", "int8")
    assert "--resident-codec does not apply to --to fused" in message


def test_gguf(moekit, refused, tiny, tmp_path):
    source, out = tmp_path / "model", tmp_path / "out.gguf"
    shutil.copytree(tiny, source)
    config = json.loads((source / "config.json").read_text())
    message = refused("convert", source, out, "--to", "gguf")
    assert "normalised weights" in message
    (source / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    args = ("convert", source, out, "--to", "gguf", "--gguf-type", "q8_0")
    dry = moekit(*args, "--dry-run", "--json").json
    assert not out.exists()
    result = moekit(*args, "--json").json
    assert {**result, "seconds": 0, "dry_run": True} == {**dry, "seconds": 0}
    assert result["architecture"] == "qwen3moe"
    assert result["bytes"] < out.stat().st_size
    assert f"wrote {out}: {result['tensors']} tensors (" in moekit(*args, "--overwrite").out


def test_dry_run_forecasts(moekit, tiny, tmp_path):
    result = moekit("convert", tiny, tmp_path / "out", "--to", "fused", "--dry-run", "--json").json
    assert result["dry_run"]
    assert result["bytes"] == result["source_bytes"] > 0
    assert result["seconds"] > 0
    assert os.listdir(tmp_path) == []


def test_existing_output(moekit, refused, tiny, tmp_path):
    args = ("convert", tiny, tmp_path / "out", "--to", "fused")
    assert moekit(*args).code == 0
    assert "--overwrite" in refused(*args)
    assert moekit(*args, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "'onnx' is not one of 'fused', 'per-expert'"),
        (["--to", "gguf", "--dtype", "float32"], "give --gguf-type"),
        (["--to", "gguf", "--gguf-type", "q4_k"], "'q4_k' is unknown; there are f32"),
        (["--to", "gguf", "--max-shard-size", "1GB"], "--max-shard-size does not apply"),
        (["--to", "gguf", "--copy-code"], "--copy-code does not apply to --to gguf"),
        (["--to", "gguf", "--restart"], "--restart does not apply to --to gguf"),
        (["--to", "fused", "--gguf-type", "f16"], "--gguf-type does not apply to --to fused"),
        ([], "--to"),
        (["--to", "fused", "--max-shard-size", "big"], "'big' is not an amount of memory"),
        (["--to", "fused", "--plan", "nowhere.json"], "nowhere.json cannot be read"),
        (["--to", "fused", "--dtype", "int3"], "int3"),
    ],
)
def test_wrong_options(refused, tiny, tmp_path, arguments, message):
    assert message in refused("convert", tiny, tmp_path / "out", *arguments)
    assert os.listdir(tmp_path) == []


def test_no_model_and_no_place(refused, tiny, tmp_path):
    assert "no such directory" in refused("convert", tmp_path / "no", tmp_path / "o", "--to=fused")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert "cannot be written: Not a directory" in refused("convert", tiny, out, "--to", "fused")


def test_truncated_shard(refused, moekit, tiny, tmp_path):
    moekit("convert", tiny, tmp_path / "model", "--to", "fused", "--max-shard-size", "100kB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    message = refused("convert", tmp_path / "model", tmp_path / "out", "--to", "per-expert")
    assert f"{shard} is truncated: its header describes {size} bytes, the file has" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_interrupt_and_resume(tiny, moekit, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    args = ("convert", tiny, out, "--to", "fused", "--max-shard-size", "1kB")
    written = []
    original = CheckpointWriter.write_rows

    def write_rows(*arguments):
        original(*arguments)
        written.append(arguments)
        if len(written) == 10:
            raise KeyboardInterrupt  # as Python does at Ctrl-C

    monkeypatch.setattr(CheckpointWriter, "write_rows", write_rows)
    done = moekit(*args)
    monkeypatch.undo()
    assert done.code == 130
    assert done.out == ""
    assert "The same command resumes it; discard it with --restart" in done.err
    assert not out.exists()
    journal = json.loads((partial / "journal.json").read_text())
    again = moekit(*args, "--json")
    assert again.json["resumed_bytes"] == journal["written_bytes"] > 0
    assert f"Resuming {partial}" in again.err
    assert os.listdir(tmp_path) == ["out"]
    assert torch.allclose(logits(tiny), logits(out), atol=1e-5)


def test_packed(moekit, refused, tiny, tmp_path):
    from moekit.runtime.store import ExpertStore

    done = moekit("convert", tiny, tmp_path / "out", "--to", "packed", "--codec", "bf16")
    assert done.code == 0
    assert done.out.startswith(f"wrote {tmp_path / 'out'}: ")
    assert "packed from per-expert" in done.out
    with ExpertStore.open(tmp_path / "out") as store:
        assert store.layers[0].codecs[0].name == "bf16"
    message = refused("convert", tiny, tmp_path / "x", "--to", "fused", "--group-size", "64")
    assert "--group-size does not apply to --to fused" in message
    message = refused("convert", tiny, tmp_path / "x", "--to", "packed", "--codec", "int5")
    assert "no codec method is named 'int5'" in message
