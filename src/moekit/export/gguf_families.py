"""What llama.cpp knows of MoE families, as data: its names for them and what its code fixes.

One row a family of transformers. What a row leaves out is asked of the config in the same way for
all of them (`gguf_keys`), and of the tensor names that the `gguf` package knows (`gguf_tensors`).
llama.cpp computes some families by a rule that its code fixes; a config that asks for another rule
would load there and give other numbers, so it is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Ways to turn router logits into weights, by the name that llama.cpp has for them.
SOFTMAX, SIGMOID = "softmax", "sigmoid"


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp runs one family.

    `arch` is the name in `gguf.MODEL_ARCH`. `score` is the function on the router's logits;
    `normalize` whether the chosen weights are divided by their sum, None where the file says so
    (`expert_weights_norm`); `scales` whether the file may say a factor (`expert_weights_scale`).
    `gating_key` writes `expert_gating_func`.

    `dense_first` allows layers without experts before those with. `pairs` are the projections
    whose rows the family's rotary embedding wants in neighbouring pairs. `latent` marks latent
    attention (MLA), `windows` a sliding window on some layers, `interleaved` banks of experts that
    are published transposed and with gate and up in turns, `own_head` that the file must hold the
    output head even where it is the embedding.

    `keys` maps further methods of `gguf.GGUFWriter` to the config's field. `fixed` are config
    fields with the only values that llama.cpp computes. `names` are (pattern, replacement) on
    published tensor names that the `gguf` package does not know as they are.
    """

    arch: str
    score: str = SOFTMAX
    normalize: bool | None = None
    scales: bool = False
    gating_key: bool = False
    dense_first: bool = False
    pairs: tuple[str, ...] = ()
    latent: bool = False
    windows: bool = False
    interleaved: bool = False
    own_head: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()


_QK = ("q_proj", "k_proj")
_GRANITE = {
    "add_attention_scale": "attention_multiplier",
    "add_embedding_scale": "embedding_multiplier",
    "add_residual_scale": "residual_multiplier",
    "add_logit_scale": "logits_scaling",
}
_GRANITE_NAMES = (
    (r"block_sparse_moe\.gate_linear", "block_sparse_moe.experts.w1"),
    (r"block_sparse_moe\.up_linear", "block_sparse_moe.experts.w3"),
    (r"\.shared_mlp\.(gate|up)_linear", r".mlp.shared_mlp.\1_proj"),
)
_CORRECTION = ((r"e_score_correction_bias$", "e_score_correction.bias"),)
_SHARED_COUNT = {"add_expert_shared_count": "n_shared_experts"}

FAMILIES: dict[str, GgufFamily] = {
    "qwen3_moe": GgufFamily("QWEN3MOE", normalize=True, fixed={"attention_bias": (False,)}),
    "qwen2_moe": GgufFamily(
        "QWEN2MOE",
        normalize=False,
        own_head=True,
        keys={"add_expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "mixtral": GgufFamily("LLAMA", normalize=True, pairs=_QK),
    "olmoe": GgufFamily("OLMOE", normalize=False, own_head=True, fixed={"clip_qkv": (None,)}),
    "granitemoe": GgufFamily(
        "GRANITE_MOE", normalize=True, pairs=_QK, keys=_GRANITE, names=_GRANITE_NAMES
    ),
    "granitemoeshared": GgufFamily(
        "GRANITE_MOE",
        normalize=True,
        pairs=_QK,
        keys=_GRANITE | {"add_expert_shared_feed_forward_length": "shared_intermediate_size"},
        names=_GRANITE_NAMES,
    ),
    "gpt_oss": GgufFamily(
        "GPT_OSS",
        normalize=True,
        windows=True,
        interleaved=True,
        own_head=True,
        names=(
            (r"\.sinks$", ".sinks.weight"),
            (r"(\.experts\.\w+_proj)_bias$", r"\1.bias"),
            (r"(\.experts\.\w+_proj)$", r"\1.weight"),
        ),
    ),
    "deepseek_v2": GgufFamily(
        "DEEPSEEK2",
        scales=True,
        gating_key=True,
        dense_first=True,
        latent=True,
        keys=_SHARED_COUNT,
    ),
    "deepseek_v3": GgufFamily(
        "DEEPSEEK2",
        score=SIGMOID,
        scales=True,
        gating_key=True,
        dense_first=True,
        latent=True,
        keys=_SHARED_COUNT,
        fixed={"rope_interleave": (True,)},
        names=_CORRECTION,
    ),
    "glm4_moe": GgufFamily(
        "GLM4_MOE",
        score=SIGMOID,
        scales=True,
        gating_key=True,
        dense_first=True,
        keys=_SHARED_COUNT,
        names=_CORRECTION,
    ),
    "dots1": GgufFamily(
        "DOTS1",
        own_head=True,
        score=SIGMOID,
        scales=True,
        gating_key=True,
        dense_first=True,
        keys=_SHARED_COUNT,
        names=_CORRECTION,
    ),
    "minimax_m2": GgufFamily(
        "MINIMAXM2",
        score=SIGMOID,
        normalize=True,
        gating_key=True,
        own_head=True,
        names=_CORRECTION,
    ),
}
