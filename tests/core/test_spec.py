"""`MoESpec` from configs of real models, broken configs and unknown families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moekit.core import family_table
from moekit.core.errors import UserError
from moekit.core.memory import model_bytes
from moekit.core.spec import MoESpec, spec_from_config
from tests.families.tiny import TINY

# The released DeepSeek-V3, as its config.json describes it.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def test_deepseek_v3():
    spec = spec_from_config(DEEPSEEK_V3)
    layer = spec.per_layer[0]
    # 671 billion parameters of which 37 billion are active, says the model card.
    assert spec.total_params == 671_026_404_352
    assert spec.active_params == 37_552_282_624
    assert spec.moe_layers == tuple(range(3, 61))
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (61, 256, 8)
    assert (spec.hidden_size, spec.expert_width) == (7168, 2048)
    assert (layer.score, layer.normalize, layer.scaling) == ("sigmoid", True, 2.5)
    assert (layer.num_groups, layer.topk_groups, layer.group_score) == (8, 4, "top2")
    assert layer.has_correction_bias
    assert layer.bias_on == "scores"
    assert (layer.num_shared_experts, layer.shared_width) == (1, 2048)
    assert layer.params_per_expert == 3 * 7168 * 2048
    assert (spec.quantization, spec.dtype) == ("fp8", "bfloat16")
    assert spec.params.buffers == 58 * 256


def test_671_billion_parameters_take_no_memory_and_under_five_seconds():
    # A fresh process: neither its time nor its memory counts what other tests have imported.
    script = (
        "import json, sys, time\n"
        "import moekit.core.spec as spec\n"
        "from moekit.core.memory import PeakMemory\n"
        "start = time.process_time()\n"
        "with PeakMemory() as memory:\n"
        "    spec.spec_from_config(json.loads(sys.argv[1]))\n"
        "print(time.process_time() - start, memory.above_start)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(DEEPSEEK_V3)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, above_start = map(float, result.stdout.split())
    assert seconds < 5
    # One layer's experts alone would be 45 GB; what is left is the import of the model's code.
    assert above_start < 200e6


@pytest.mark.parametrize(
    ("config", "total", "active", "active_no_embedding"),
    [
        (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704, 2_730_702_848),
        ({"model_type": "mixtral"}, 46_702_792_704, 12_879_925_248, 12_617_781_248),
        # Tied embeddings count once.
        (
            QWEN3_30B_A3B | {"tie_word_embeddings": True},
            30_532_122_624 - 151936 * 2048,
            3_353_032_704 - 151936 * 2048,
            2_730_702_848,
        ),
    ],
)
def test_known_models(config: dict[str, Any], total: int, active: int, active_no_embedding: int):
    params = spec_from_config(config).params
    assert (params.total, params.active) == (total, active)
    assert params.active_no_embedding == active_no_embedding


def test_sparse_attention_counts_as_sparse():
    # JetMoE-8B: 8.5 billion parameters, 2.2 billion of them active (without embeddings here); its
    # attention has experts, too.
    config = {"model_type": "jetmoe", "num_hidden_layers": 24}
    params = spec_from_config(config).params
    assert params.total == 8_522_237_952
    assert 2.15e9 < params.active_no_embedding < 2.3e9


def test_from_directory_file_dict_and_object_agree(tmp_path: Path):
    config = TINY["qwen3_moe"]()
    config.save_pretrained(tmp_path)
    spec = spec_from_config(config)
    assert MoESpec.from_dir(tmp_path) == spec
    assert MoESpec.from_dir(tmp_path / "config.json") == spec
    assert MoESpec.from_config(config.to_dict()) == spec
    assert MoESpec.from_config(config) == spec


def test_the_config_object_stays_as_it_was():
    config = TINY["gpt_oss"]()
    before = config.to_dict(), dict(vars(config))
    spec_from_config(config)
    assert (config.to_dict(), dict(vars(config))) == before


def test_bytes_use_the_parts():
    spec = spec_from_config(QWEN3_30B_A3B)
    assert spec.bytes(16) == 2 * spec.total_params
    assert spec.bytes(4) == model_bytes(spec.params.parts, 4)
    assert spec.bytes(4) < 0.3 * spec.bytes(16)


def test_json_holds_everything():
    spec = spec_from_config(TINY["deepseek_v3"]())
    read = json.loads(spec.to_json())
    assert read["params"]["total"] == spec.total_params
    assert read["num_experts"] == 8
    assert read["moe_layers"] == [1, 2]
    assert read["per_layer"][0]["num_groups"] == 4


def test_per_layer_values_differ_where_the_layers_do():
    config = TINY["hunyuan_v1_moe"]()
    config.moe_topk = [1, 2, 3]
    spec = spec_from_config(config)
    assert [layer.top_k for layer in spec.per_layer] == [1, 2, 3]
    assert spec.top_k == 3


def test_text_architecture_of_a_whole_config_counts_the_text_part():
    whole = {"model_type": "qwen3_5_moe", "text_config": TINY["qwen3_5_moe"]().to_dict()}
    text = spec_from_config(whole | {"architectures": ["Qwen3_5MoeForCausalLM"]})
    assert text.params == spec_from_config(TINY["qwen3_5_moe"]()).params
    assert spec_from_config(whole).total_params > text.total_params


def test_unlisted_family_gets_a_spec_with_unknown_score(monkeypatch: pytest.MonkeyPatch):
    known = spec_from_config(TINY["deepseek_v3"]())
    monkeypatch.delitem(family_table.RULES, "deepseek_v3")
    spec = spec_from_config(TINY["deepseek_v3"]())
    layer = spec.per_layer[0]
    assert (layer.score, layer.normalize, layer.selection) == ("unknown", None, "unknown")
    assert (layer.num_experts, layer.top_k, layer.scaling) == (8, 2, 2.5)
    assert spec.params == known.params


def test_dense_model_is_refused():
    with pytest.raises(UserError, match=r"'llama' \(LlamaForCausalLM\) has no MoE layers"):
        spec_from_config({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64})


def test_unknown_model_type_names_the_nearest():
    with pytest.raises(UserError, match=r"'qwen3_mo'.*nearest are.*qwen3_moe"):
        spec_from_config({"model_type": "qwen3_mo"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "has no model_type"),
        ('{"model_type": "mixtral", "hidden_size": "wide"}', "not a valid mixtral config"),
        ('{"model_type": "dots1"}', "builds no Dots1ForCausalLM"),
        ('{"model_type": "deepseek_v2"}', "gives no value for any of top_k"),
    ],
)
def test_broken_config(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        MoESpec.from_dir(tmp_path)


def test_directory_without_a_model(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        MoESpec.from_dir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        MoESpec.from_dir(tmp_path / "absent")


def test_code_beside_a_config_never_runs(tmp_path: Path):
    proof = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    remote = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil")
    config = TINY["mixtral"]().to_dict() | {"auto_map": remote, "architectures": ["Evil"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MoESpec.from_dir(tmp_path).architecture == "MixtralForCausalLM"
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not know"):
        MoESpec.from_dir(tmp_path)
    assert not proof.exists()
