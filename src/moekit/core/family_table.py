"""What moekit knows about single MoE families and cannot read from the structure of their modules.

Keys are folders of `transformers.models`; a family that is not listed gets the score "unknown".
`tests/families/test_spec.py` compares every row with what the family's router really does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attr:
    """A value that the router, the block or, where `default` is None, the config holds by name."""

    name: str
    default: bool | None = None


NORM_FLAG = Attr("norm_topk_prob", default=True)


@dataclass(frozen=True)
class Rule:
    """How a router turns logits [T, E] into weights and ids [T, K].

    `score` maps logits, times `logit_scale` and softly capped at `logit_cap`, to scores;
    `normalize` divides the chosen ones by their sum (a softmax over the chosen logits is a
    normalised softmax). `bias_on` says what the correction bias is added to for the choice,
    `group_score` how groups of experts are ranked: by their two best or by their best ("max").
    `selection` is "topk" over the scores, a "hash" of the token id, or "product_key". `averaged`
    weights are divided by top_k and the block multiplies the sum back; `with_shared` counts the
    shared experts in the normalising sum; `scales_input` weights an expert's input, not its output.
    """

    score: str | Attr
    normalize: bool | Attr = True
    bias_on: str = "scores"
    group_score: str | None = "top2"
    selection: str = "topk"
    averaged: bool = False
    with_shared: bool = False
    scales_input: bool = False
    logit_scale: float | Attr = 1.0
    logit_cap: float | Attr = 0.0


@dataclass(frozen=True)
class Switch:
    """A family whose config chooses between rules by the value of `attribute`."""

    attribute: Attr
    rules: dict[str, Rule]


SOFTMAX = Rule("softmax", normalize=NORM_FLAG)
SIGMOID = Rule("sigmoid", normalize=NORM_FLAG)
RAW_SOFTMAX = Rule("softmax", normalize=False)
GREEDY_GROUPS = Switch(
    Attr("topk_method"),
    {
        "greedy": Rule("softmax", normalize=False, group_score=None),
        "group_limited_greedy": Rule("softmax", normalize=False, group_score="max"),
    },
)

_SOFTMAX_FAMILIES = """
aria diffusion_gemma ernie4_5_moe ernie4_5_vl_moe flex_olmo gemma4 gpt_oss granitemoe
granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe jetmoe mellum minimax mistral4
mistral_large4 mixtral nllb_moe olmoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe
qwen3_vl_moe qwen4_exp
"""
_SIGMOID_FAMILIES = """
afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint
glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 kimi_linear lfm2_moe
mimo_v2_flash minimax_m2 minimax_m3_vl nemotron_h solar_open step3p7
"""
_RAW_SOFTMAX_FAMILIES = "jamba longcat_flash switch_transformers zaya"

RULES: dict[str, Rule | Switch] = {
    **dict.fromkeys(_SOFTMAX_FAMILIES.split(), SOFTMAX),
    **dict.fromkeys(_SIGMOID_FAMILIES.split(), SIGMOID),
    **dict.fromkeys(_RAW_SOFTMAX_FAMILIES.split(), RAW_SOFTMAX),
    **dict.fromkeys(("deepseek_v2", "deepseek_ocr2", "unlimited_ocr"), GREEDY_GROUPS),
    "cohere2_moe": Switch(
        Attr("expert_selection_fn"), {"softmax": Rule("softmax"), "sigmoid": SIGMOID}
    ),
    "dbrx": Rule("softmax", normalize=Attr("moe_normalize_expert_weights")),
    "deepseek_v4": Rule(Attr("scoring_func")),
    "doge": Rule("softmax", selection="product_key"),
    "inkling": Rule("sigmoid", with_shared=True),
    "inkling2": Rule(Attr("scoring_func")),
    "kolibri1": Rule("sigmoid", normalize=NORM_FLAG, bias_on="logits"),
    "laguna": Rule("sigmoid", logit_cap=Attr("router_logit_softcapping")),
    "llama4": Rule("sigmoid", normalize=False, scales_input=True),
    "muse_spark": Rule("sigmoid", logit_scale=Attr("output_multiplier")),
    "openai_privacy_filter": Rule("softmax", averaged=True),
    "phimoe": Rule("sparsemixer", normalize=False),
    "vitpose_backbone": Rule("none", normalize=False, selection="caller"),
}


@dataclass(frozen=True)
class Bank:
    """Where the down projection of one layer's experts lies, and the meaning of its dimensions.

    `down` is the parameter below the experts module, `dims` its dimensions out of E, F, D and "EF"
    (experts and widths flattened). `tensors` are the name prefixes of what belongs to the experts
    where their module holds other things too. `fused` says that gate and up are one tensor.
    """

    down: str
    dims: tuple[str, ...]
    gated: bool = True
    fused: bool = True
    biased: bool = False
    tensors: tuple[str, ...] = ("",)


# The storage of the families outside the seam; at the seam the decorator's flags say it all.
BANKS: dict[str, Bank] = {
    "dbrx": Bank("mlp.w2", ("EF", "D"), fused=False),
    "doge": Bank(
        "up_embed.weight",
        ("E", "D"),
        gated=False,
        fused=False,
        tensors=("down_embed", "up_embed"),
    ),
    "jetmoe": Bank(
        "output_linear.weight", ("E", "D", "F"), tensors=("input_linear", "output_linear")
    ),
    "llama4": Bank("down_proj", ("E", "F", "D")),
    "nllb_moe": Bank("expert_0.fc2.weight", ("D", "F"), gated=False, fused=False, biased=True),
    "switch_transformers": Bank("expert_0.wo.weight", ("D", "F"), gated=False, fused=False),
    "vitpose_backbone": Bank("0.weight", ("D", "F"), gated=False, fused=False, biased=True),
}

# What a bank at the seam is made of; biases start with the same names.
SEAM_TENSORS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

# Numbers that no module or config of the family holds.
TOP_K = {"nllb_moe": 2, "switch_transformers": 1, "vitpose_backbone": 1}

# One quantity, many names: the first that the router, the block or the config has is taken.
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
NUM_EXPERTS_NAMES = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
SCALING_NAMES = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
# Blocks that halve the sum of routed and shared experts when this is "average".
SHARED_STRATEGY_NAME = "shared_expert_combination_strategy"
GROUP_NAMES = ("num_group", "topk_group")
# Outputs of a router beyond the experts with weights: identity experts, or a choice of none.
CHOICES_NAMES = ("num_router_classes", "n_routed_experts")
CORRECTION_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
EXPERT_SCALE_NAMES = ("per_expert_scale",)
NUM_SHARED_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_DOWN_NAMES = ("down_proj", "output_linear", "w2", "fc2")

# Modules outside the MoE layers that also run only some of their experts: class to the prefixes.
SPARSE_ATTENTION = {"JetMoeMoA": ("input_linear", "output_linear")}
