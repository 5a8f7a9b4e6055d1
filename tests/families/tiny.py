"""A tiny random model of every MoE family of the installed transformers.

`TINY` maps a family (the name of its folder in `transformers.models`) to a function that returns
a tiny config; `SKIP` holds the families that have none, each with its reason. A config starts from
`COMMON` (only the fields that its class declares are set) and is finished by the row of `ROWS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 128

# Field names differ by family; every spelling gets the same small value. Widths are multiples of 8
# because grouped_mm needs rows of 16 bytes, and 8 experts in 4 groups keep top-2 of 2 groups reachable.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "sliding_window": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "router_jitter_noise": 0.0,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hc_mult": 2,
}

# Fields of vision and audio parts, which the text-only tests never run but which must exist.
ENCODER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "projection_intermediate_size": 48,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "deepstack_visual_indexes": (0, 1),
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "output_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "n_window": 4,
    "downsample_hidden_size": 8,
    "hidden_sizes": (8, 8, 16, 32),
    "depths": (1, 1, 1, 1),
    "output_channels": 16,
    "downsample_channels": (16, 32),
    "global_attn_indexes": (1,),
    "mlp_dim": 48,
    "window_size": 2,
    "num_key_value_heads": 4,
    "mlp_ratio": 1.5,
    "layer_types": None,
}

MLA = {"num_key_value_heads": 4}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LINEAR_MIX = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


@dataclasses.dataclass(frozen=True)
class Row:
    """How one family differs from `COMMON`: `config` is the `model_type` to build, `model` the class
    (default: the causal LM of the config), `fields` override, `text` and `vision` override parts."""

    config: str
    model: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    generate: bool = True


def _row(config: str, *, model: str | None = None, generate: bool = True, **fields: Any) -> Row:
    text, vision = fields.pop("text", {}), fields.pop("vision", {})
    return Row(config, model, fields, text, vision, generate)


ROWS: dict[str, Row] = {
    "afmoe": _row("afmoe"),
    "aria": _row("aria_text", moe_num_experts=8),
    "axk1": _row("axk1", **MLA, **DENSE_FIRST),
    "axk2": _row("axk2", **MLA, **DENSE_FIRST),
    "bailing_hybrid": _row("bailing_hybrid", **MLA, **DENSE_FIRST, **LINEAR_MIX),
    "beam": _row("beam", **DENSE_FIRST),
    "cohere2_moe": _row("cohere2_moe", **DENSE_FIRST, num_shared_experts=2),
    "deepseek_v2": _row("deepseek_v2", **MLA, topk_method="group_limited_greedy"),
    "deepseek_v3": _row("deepseek_v3", **MLA),
    "deepseek_v32": _row("deepseek_v32", **MLA, **DENSE_FIRST),
    "deepseek_v4": _row("deepseek_v4"),
    "dots1": _row("dots1", n_shared_experts=1),
    "dots3_note": _row("dots3_note_text", **MLA, **DENSE_FIRST),
    "ernie4_5_moe": _row("ernie4_5_moe", moe_num_experts=8, moe_k=2),
    "exaone_moe": _row("exaone_moe", **DENSE_FIRST),
    "flex_olmo": _row("flex_olmo"),
    "flint": _row("flint", mlp_only_layers=[0]),
    "gemma4": _row("gemma4_text", enable_moe_block=True, top_k_experts=2),
    "glm4_moe": _row("glm4_moe"),
    "glm4_moe_lite": _row("glm4_moe_lite", **MLA, **DENSE_FIRST),
    "glm_moe_dsa": _row("glm_moe_dsa", **MLA, **DENSE_FIRST),
    "gpt_oss": _row("gpt_oss"),
    "granitemoe": _row("granitemoe"),
    "granitemoe_swa": _row("granitemoe_swa"),
    "granitemoehybrid": _row(
        "granitemoehybrid",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "granitemoeshared": _row("granitemoeshared"),
    "hunyuan_v1_moe": _row("hunyuan_v1_moe"),
    "hy_v3": _row("hy_v3", **DENSE_FIRST),
    "hy_v4": _row("hy_v4", **DENSE_FIRST, **MLA),
    "inkling": _row("inkling_text"),
    "inkling2": _row("inkling2_text"),
    "jamba": _row(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
        mamba_d_state=8,
    ),
    "kimi_linear": _row("kimi_linear", **MLA, **DENSE_FIRST, **LINEAR_MIX),
    "kolibri1": _row("kolibri1"),
    "laguna": _row("laguna", **DENSE_FIRST),
    "lfm2_moe": _row("lfm2_moe", layer_types=["conv", "full_attention", "conv"]),
    "mellum": _row("mellum", **DENSE_FIRST),
    "mimo_v2_flash": _row("mimo_v2_flash", **DENSE_FIRST),
    "minimax": _row("minimax"),
    "minimax_m2": _row("minimax_m2"),
    "minimax_m3_vl": _row("minimax_m3_vl_text", **DENSE_FIRST),
    "mistral4": _row("mistral4", model="Mistral4ForCausalLM", **MLA),
    "mixtral": _row("mixtral"),
    "nemotron_h": _row("nemotron_h"),
    "olmoe": _row("olmoe"),
    "phimoe": _row("phimoe"),
    "qwen2_moe": _row("qwen2_moe", mlp_only_layers=[0]),
    "qwen3_5_moe": _row("qwen3_5_moe_text", **LINEAR_MIX),
    "qwen3_moe": _row("qwen3_moe", mlp_only_layers=[0], norm_topk_prob=True),
    "qwen3_next": _row("qwen3_next", **LINEAR_MIX),
    "qwen4_exp": _row(
        "qwen4_exp_text", layer_types=["linear_attention", "indexed_attention", "linear_attention"]
    ),
    "solar_open": _row("solar_open"),
    "zaya": _row("zaya", num_experts_per_tok=1, router_hidden_size=16),
    "dbrx": _row("dbrx"),
    "doge": _row("doge", is_moe=True, num_experts=16),
    "jetmoe": _row("jetmoe", kv_channels=8),
    "llama4": _row("llama4_text", moe_layers=[1, 2], intermediate_size_mlp=48),
    "longcat_flash": _row(
        "longcat_flash",
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        zero_expert_num=4,
        **MLA,
    ),
    "openai_privacy_filter": _row(
        "openai_privacy_filter", model="OpenAIPrivacyFilterForTokenClassification", generate=False
    ),
    "nllb_moe": _row(
        "nllb-moe",
        model="NllbMoeForConditionalGeneration",
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        decoder_start_token_id=2,
        pad_token_id=1,
    ),
    "switch_transformers": _row(
        "switch_transformers",
        model="SwitchTransformersForConditionalGeneration",
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "deepseek_ocr2": _row(
        "deepseek_ocr2", model="DeepseekOcr2ForConditionalGeneration", text=DENSE_FIRST
    ),
    "diffusion_gemma": _row(
        "diffusion_gemma", model="DiffusionGemmaForBlockDiffusion", generate=False
    ),
    "ernie4_5_vl_moe": _row("ernie4_5_vl_moe", model="Ernie4_5_VLMoeForConditionalGeneration"),
    "glm4v_moe": _row("glm4v_moe", model="Glm4vMoeForConditionalGeneration"),
    "glm5_next": _row("glm5_next", model="Glm5NextForConditionalGeneration"),
    "mistral_large4": _row("mistral_large4", model="MistralLarge4ForConditionalGeneration"),
    "muse_spark": _row("muse_spark", model="MuseSparkForConditionalGeneration"),
    "qwen3_omni_moe": _row(
        "qwen3_omni_moe_thinker", model="Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
    "qwen3_vl_moe": _row("qwen3_vl_moe", model="Qwen3VLMoeForConditionalGeneration"),
    "step3p7": _row("step3p7", model="Step3p7ForConditionalGeneration"),
    "unlimited_ocr": _row("unlimited_ocr", model="UnlimitedOcrForConditionalGeneration"),
}

SKIP: dict[str, str] = {
    "qwen4_exp": "its tiny config does not build yet",
    "dbrx": "its tiny config does not build yet",
    "deepseek_ocr2": "its tiny config does not build yet",
    "diffusion_gemma": "its tiny config does not build yet",
    "ernie4_5_vl_moe": "its tiny config does not build yet",
    "glm4v_moe": "its tiny config does not build yet",
    "glm5_next": "its tiny config does not build yet",
    "mistral_large4": "its tiny config does not build yet",
    "muse_spark": "its tiny config does not build yet",
    "step3p7": "its tiny config does not build yet",
    "vitpose_backbone": "an image encoder: it has no input_ids and its expert is chosen by the caller, not by a router",
}


def _tiny(
    config_class: type[PretrainedConfig], row: Row, common: dict[str, Any], **fields: Any
) -> PretrainedConfig:
    declared = {f.name for f in dataclasses.fields(config_class)}
    values = {name: value for name, value in common.items() if name in declared}
    for name, part in config_class.sub_configs.items():
        extra = row.text if name == "text_config" else row.vision if name == "vision_config" else {}
        base = COMMON if name == "text_config" else COMMON | ENCODER
        if "model_type" in extra or part.__name__ == "AutoConfig":
            extra = dict(extra)
            part = CONFIG_MAPPING[extra.pop("model_type")]
        values[name] = _tiny(part, row, base, **extra)
    return config_class(**(values | fields))


def _config(family: str) -> PretrainedConfig:
    row = ROWS[family]
    return _tiny(CONFIG_MAPPING[row.config], row, COMMON, **row.fields)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    family: functools.partial(_config, family) for family in ROWS if family not in SKIP
}


def model_class(family: str) -> type[PreTrainedModel]:
    row = ROWS[family]
    if row.model is not None:
        return getattr(transformers, row.model)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(TINY[family]())]


def build_tiny(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Build the tiny model of a family with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_type)._from_config(TINY[model_type](), dtype=dtype)
    return model.eval()


def tiny_inputs(
    model_type: str, model: PreTrainedModel, batch: int = 2, length: int = 9
) -> dict[str, torch.Tensor]:
    """Random forward arguments, `input_ids` [batch, length] and what else the family needs."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return inputs


def supports_generate(model_type: str) -> bool:
    """Whether `model.generate(input_ids)` works for the family."""
    return ROWS[model_type].generate
