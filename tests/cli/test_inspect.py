import json
import shutil
import time

import pytest

from moekit.cli.inspect import count, ranges

DEEPSEEK_V3 = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}


def test_directory(moekit, tiny):
    result = moekit("inspect", tiny, "--json").json
    assert (result["model_type"], result["num_experts"], result["top_k"]) == ("qwen3_moe", 4, 2)
    # Two banks of [4, 2*16, 32] and [4, 32, 16], two layers, all at 4 bytes.
    assert result["params"]["routed"] == 2 * 4 * (2 * 16 * 32 + 32 * 16)
    assert result["memory"]["routed"]["32"] == 4 * result["params"]["routed"]
    assert result["checkpoint"]["layout"] == "per-expert"
    assert result["checkpoint"]["bytes"] == 4 * result["total_params"]
    text = moekit("inspect", tiny).out
    assert "4, top-2, width 16" in text
    assert "MoE layers 0-1" in text
    assert "32 bit" in text


def test_config_of_671_billion_parameters(moekit, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DEEPSEEK_V3))
    start = time.process_time()
    done = moekit("inspect", config)
    # The limit is 5 s; the time of this process, because the clock on the wall measures the others.
    assert time.process_time() - start < 5
    for words in ("671B", "37.6B", "MoE layers 3-60", "natively, fp8", "from 4 of 8 groups"):
        assert words in done.out
    assert moekit("inspect", config, "--json").json["checkpoint"] is None


def test_what_fits_grows_with_memory(moekit, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    fits = moekit("inspect", tmp_path, "--json").json["fits"]
    at_four_bits = [row[-1]["expert_fraction"] for row in fits.values()]
    assert at_four_bits == sorted(at_four_bits)
    assert (at_four_bits[0], at_four_bits[-1]) == (0.0, 1.0)


def test_refusals(refused, tiny, tmp_path):
    assert "no such directory" in refused("inspect", tmp_path / "nowhere")
    assert "no config.json" in refused("inspect", tmp_path)
    broken = tmp_path / "config.json"
    broken.write_text("{")
    assert "not valid JSON" in refused("inspect", broken)
    broken.write_text('{"model_type": "mixtrall"}')
    assert "mixtral" in refused("inspect", broken)
    broken.write_text('{"model_type": "llama"}')
    assert "no MoE layers" in refused("inspect", broken)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated" in refused("inspect", copy)


@pytest.mark.parametrize(
    ("number", "text"),
    [(671026404352, "671B"), (37552282624, "37.6B"), (999_600, "1M"), (512, "512"), (0, "0")],
)
def test_count(number, text):
    assert count(number) == text


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
