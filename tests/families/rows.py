"""What a tiny model of each MoE family is made of: common small values and one row a family."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCAB = 128

# Field names differ by family; every spelling gets the same small value. Widths are multiples of 8
# because grouped_mm needs rows of 16 bytes; 2 of 4 groups leave 4 of the 8 experts to choose from.
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
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VL = {"rope_parameters": MROPE}
PIXTRAL = {"model_type": "pixtral"}


@dataclasses.dataclass(frozen=True)
class Row:
    """How one family differs from `COMMON`.

    `config` is the `model_type` to build and `model` the class (default: the causal LM of the
    config); `fields` override the config's, those of a sub-config as a nested dict.
    """

    config: str
    model: str | None
    generate: bool
    fields: dict[str, Any]


def _row(config: str, *, model: str | None = None, generate: bool = True, **fields: Any) -> Row:
    return Row(config, model, generate, fields)


ROWS: dict[str, Row] = {
    "afmoe": _row("afmoe"),
    "aria": _row("aria_text", moe_num_experts=8),
    "axk1": _row("axk1", **MLA, **DENSE_FIRST),
    "axk2": _row("axk2", **MLA, **DENSE_FIRST),
    "bailing_hybrid": _row("bailing_hybrid", **MLA, **DENSE_FIRST, **LINEAR_MIX),
    "beam": _row("beam", **DENSE_FIRST),
    "cohere2_moe": _row("cohere2_moe", **DENSE_FIRST, num_shared_experts=2),
    "dbrx": _row(
        "dbrx",
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    "deepseek_ocr2": _row(
        "deepseek_ocr2",
        model="DeepseekOcr2ForConditionalGeneration",
        text_config={**DENSE_FIRST, **MLA},
        vision_config={"sam_config": {"downsample_channels": [16, 32]}},
    ),
    "deepseek_v2": _row("deepseek_v2", **MLA, topk_method="group_limited_greedy"),
    "deepseek_v3": _row("deepseek_v3", **MLA),
    "deepseek_v32": _row("deepseek_v32", **MLA, **DENSE_FIRST),
    "deepseek_v4": _row(
        "deepseek_v4",
        num_key_value_heads=1,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        o_groups=2,
        o_lora_rank=16,
        head_dim=16,
        partial_rotary_factor=0.5,
    ),
    "diffusion_gemma": _row(
        "diffusion_gemma",
        model="DiffusionGemmaForBlockDiffusion",
        generate=False,
        text_config={"top_k_experts": 2},
        vision_config={"model_type": "gemma4_vision"},
        canvas_length=8,
    ),
    "doge": _row("doge", is_moe=True, num_experts=16),
    "dots1": _row("dots1", n_shared_experts=1),
    "dots3_note": _row(
        "dots3_note_text",
        **MLA,
        **DENSE_FIRST,
        shared_experts_intermediate_size=40,
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        head_dim=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
    ),
    "ernie4_5_moe": _row("ernie4_5_moe", moe_num_experts=8, moe_k=2),
    "ernie4_5_vl_moe": _row(
        "ernie4_5_vl_moe",
        model="Ernie4_5_VLMoeForConditionalGeneration",
        text_config={
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": [24, 16],
            "rope_parameters": MROPE,
        },
    ),
    "exaone_moe": _row("exaone_moe", **DENSE_FIRST),
    "flex_olmo": _row("flex_olmo"),
    "flint": _row("flint", mlp_only_layers=[0]),
    "gemma4": _row(
        "gemma4_text",
        enable_moe_block=True,
        top_k_experts=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        global_head_dim=8,
    ),
    "glm4_moe": _row("glm4_moe"),
    "glm4_moe_lite": _row("glm4_moe_lite", **MLA, **DENSE_FIRST),
    "glm4v_moe": _row(
        "glm4v_moe",
        model="Glm4vMoeForConditionalGeneration",
        text_config={**QWEN_VL, "num_attention_heads": 2},
    ),
    "glm5_next": _row(
        "glm5_next",
        model="Glm5NextForConditionalGeneration",
        text_config={
            **MLA,
            **DENSE_FIRST,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
    ),
    "glm_moe_dsa": _row("glm_moe_dsa", **MLA, **DENSE_FIRST),
    "gpt_oss": _row("gpt_oss"),
    "granitemoe": _row("granitemoe"),
    "granitemoe_swa": _row("granitemoe_swa"),
    "granitemoehybrid": _row(
        "granitemoehybrid",
        **LINEAR_MIX,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "granitemoeshared": _row("granitemoeshared"),
    "hunyuan_v1_moe": _row("hunyuan_v1_moe"),
    "hy_v3": _row("hy_v3", **DENSE_FIRST),
    "hy_v4": _row("hy_v4", **DENSE_FIRST, **MLA),
    "inkling": _row("inkling_text", **DENSE_FIRST, **INKLING, rel_extent=16, d_rel=8),
    "inkling2": _row("inkling2_text", **INKLING, rel_extent=16, d_rel=8),
    "jamba": _row(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
        mamba_d_state=8,
    ),
    "jetmoe": _row("jetmoe", kv_channels=8),
    "kimi_linear": _row("kimi_linear", **MLA, **DENSE_FIRST, **LINEAR_MIX),
    "kolibri1": _row("kolibri1"),
    "laguna": _row("laguna", **DENSE_FIRST, moe_router_logit_softcapping=2.0),
    "lfm2_moe": _row("lfm2_moe", layer_types=["conv", "full_attention", "conv"]),
    "llama4": _row("llama4_text", moe_layers=[1, 2], intermediate_size_mlp=48),
    "longcat_flash": _row(
        "longcat_flash",
        **MLA,
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        zero_expert_num=4,
    ),
    "mellum": _row("mellum", **DENSE_FIRST),
    "mimo_v2_flash": _row("mimo_v2_flash", **DENSE_FIRST),
    "minimax": _row("minimax"),
    "minimax_m2": _row("minimax_m2"),
    "minimax_m3_vl": _row(
        "minimax_m3_vl_text", **DENSE_FIRST, dense_intermediate_size=48, rotary_dim=8
    ),
    "mistral4": _row("mistral4", model="Mistral4ForCausalLM", **MLA),
    "mistral_large4": _row(
        "mistral_large4",
        model="MistralLarge4ForConditionalGeneration",
        text_config={**MLA, **DENSE_FIRST},
        vision_config=PIXTRAL,
    ),
    "mixtral": _row("mixtral"),
    "muse_spark": _row(
        "muse_spark",
        model="MuseSparkForConditionalGeneration",
        text_config={**DENSE_FIRST, "moe_hidden_size": 16},
        audio_config={"num_hidden_layers": 4},
        out_hidden_size=32,
        projector_hidden_size=32,
    ),
    "nemotron_h": _row(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        moe_shared_expert_intermediate_size=40,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
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
    "olmoe": _row("olmoe"),
    "openai_privacy_filter": _row(
        "openai_privacy_filter",
        model="OpenAIPrivacyFilterForTokenClassification",
        generate=False,
    ),
    "phimoe": _row("phimoe", router_jitter_noise=0.1),
    "qwen2_moe": _row("qwen2_moe", mlp_only_layers=[0]),
    "qwen3_5_moe": _row("qwen3_5_moe_text", **LINEAR_MIX),
    "qwen3_moe": _row("qwen3_moe", mlp_only_layers=[0], norm_topk_prob=True),
    "qwen3_next": _row("qwen3_next", **LINEAR_MIX),
    "qwen3_omni_moe": _row(
        "qwen3_omni_moe_thinker",
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        text_config=QWEN_VL,
        vision_start_token_id=0,
    ),
    "qwen3_vl_moe": _row(
        "qwen3_vl_moe", model="Qwen3VLMoeForConditionalGeneration", text_config=QWEN_VL
    ),
    "qwen4_exp": _row(
        "qwen4_exp_text",
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=64,
        indexer_compress_ratio=4,
    ),
    "solar_open": _row("solar_open"),
    "step3p7": _row(
        "step3p7",
        model="Step3p7ForConditionalGeneration",
        text_config={**DENSE_FIRST, "share_expert_dim": 40, "pad_token_id": 0},
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
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
    "unlimited_ocr": _row(
        "unlimited_ocr",
        model="UnlimitedOcrForConditionalGeneration",
        text_config=MLA,
    ),
    "zaya": _row("zaya", num_experts_per_tok=1, router_hidden_size=16),
}

SKIP: dict[str, str] = {
    "vitpose_backbone": "an image encoder: pixels in, feature maps and no logits out, and the "
    "caller names the expert of an image, so there is no routing to compare",
}
