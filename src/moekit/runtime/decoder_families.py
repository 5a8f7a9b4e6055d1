"""The families that the native decoder runs, and what their modules do not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How a family differs from the common decoder layer.

    `window` says where a sliding window comes from: none, the config's for all layers, or the
    config's for the layers of type "sliding_attention". `norms` are the names of the norms before
    and after attention and before and after the MLP. `in_pairs` rotates neighbours instead of
    halves, or names the flag of the config that says so. `*_scale` and `clip` are the names of
    numbers in the config.
    """

    window: Literal["none", "config", "layers"] = "none"
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    in_pairs: bool | str = False
    norm_after_rotation: bool = False
    rotates_only_windows: bool = False
    clip: str = ""
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_divisor: str = ""
    smallest_sum: str = ""
    activation: str = ""


POST_NORMS = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(in_pairs=True),
    "deepseek_v3": Family(in_pairs="rope_interleave"),
    "dots1": Family(window="layers"),
    "ernie4_5_moe": Family(in_pairs=True, smallest_sum="moe_norm_min"),
    "exaone_moe": Family(window="layers", rotates_only_windows=True),
    "flex_olmo": Family(norms=POST_NORMS),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(in_pairs="rope_interleave"),
    "gpt_oss": Family(window="layers", activation="clamped_swiglu"),
    "granitemoe": Family(
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "hunyuan_v1_moe": Family(
        qk_norms=("query_layernorm", "key_layernorm"), norm_after_rotation=True
    ),
    "mellum": Family(window="layers"),
    "minimax_m2": Family(),
    "mixtral": Family(window="config"),
    "olmoe": Family(clip="clip_qkv"),
    "qwen2_moe": Family(window="layers"),
    "qwen3_moe": Family(window="config"),
    "solar_open": Family(),
}
