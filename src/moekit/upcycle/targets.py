"""Which MoE class of transformers can hold a dense family turned into a MoE, and how its config
says so.

A target has the attention, norms and embeddings of the dense family, so that those are copied; what
it cannot express (layers without experts, raw weights, shared experts) is in its row.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from moekit.core.errors import UserError

# What a config says of a model besides its shape; everything else goes over by name.
NOT_COPIED = {"architectures", "model_type", "auto_map", "transformers_version", "dtype"}
# A class whose shared expert cannot be left out gets one of this width that adds nothing.
INERT_WIDTH = 8


@dataclass(frozen=True)
class Wanted:
    """The MoE that a converter asks for, with E experts of width F in the layers `moe_layers`.

    `weights` is "renormalised" (those of a token sum to one) or "raw" (probabilities of all
    experts); `shared_width` is 0 without shared experts.
    """

    num_experts: int
    top_k: int
    expert_width: int
    moe_layers: tuple[int, ...]
    weights: str = "renormalised"
    shared_width: int = 0


@dataclass(frozen=True)
class Target:
    """A MoE family: names of its config fields and what it can express.

    `width` is the field of the expert width; `raw` whether weights may stay probabilities;
    `dense` says which layers may have no experts: "none", "any" or "first". `shared` is the module
    of the shared experts, "" where there is none; `shared_gain` is what their output is multiplied
    by when their own gate has zero weights, `shared_required` whether they must be there, and
    `shared_field` and `shared_unit` how the config counts them ("neurons" or "experts").
    `zeros` are parameters that start at zero; `fixed` are further values of the config.
    """

    family: str
    experts: str
    top_k: str
    width: str
    raw: bool = False
    dense: str = "none"
    shared: str = ""
    shared_gain: float = 1.0
    shared_required: bool = False
    shared_field: str = ""
    shared_unit: str = "neurons"
    zeros: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def refusal(self, wanted: Wanted, num_layers: int) -> str | None:
        """Why the family cannot hold it, or None."""
        dense = sorted(set(range(num_layers)) - set(wanted.moe_layers))
        if dense and self.dense == "none":
            return "has experts in every layer"
        if self.dense == "first" and dense != list(range(len(dense))):
            return "has layers without experts only in front"
        if wanted.weights == "raw" and not self.raw:
            return "renormalises the weights of the chosen experts"
        if wanted.shared_width and not self.shared:
            return "has no shared experts"
        if self.shared_required and not wanted.shared_width and self.shared_unit == "experts":
            return "always has a shared expert"
        if self.shared_unit == "experts" and wanted.shared_width % wanted.expert_width:
            return (
                f"counts shared experts, and a shared width of {wanted.shared_width} is no "
                f"multiple of the expert width of {wanted.expert_width}"
            )
        return None

    def shared_width(self, wanted: Wanted) -> int:
        """The width of the shared experts that the model will have."""
        return wanted.shared_width or (INERT_WIDTH if self.shared_required else 0)

    def config(self, source: PretrainedConfig, wanted: Wanted) -> PretrainedConfig:
        """The config of the MoE that the model of `source` becomes."""
        made = CONFIG_MAPPING[self.family]
        known = {item.name for item in fields(made)} | {"head_dim"}
        given = source.to_dict()
        values = {k: copy.deepcopy(v) for k, v in given.items() if k in known - NOT_COPIED}
        if values.get("head_dim") is None:
            values.pop("head_dim", None)
        values |= {
            self.experts: wanted.num_experts,
            self.top_k: wanted.top_k,
            self.width: wanted.expert_width,
            **self.fixed,
        }
        if self.raw:
            values["norm_topk_prob"] = wanted.weights == "renormalised"
        if self.shared_field:
            width = self.shared_width(wanted)
            unit = wanted.expert_width if self.shared_unit == "experts" else 1
            values[self.shared_field] = width // unit
        values |= self._dense_layers(int(source.num_hidden_layers), wanted.moe_layers)
        return made(**values)

    def _dense_layers(self, num_layers: int, moe_layers: tuple[int, ...]) -> dict[str, Any]:
        dense = sorted(set(range(num_layers)) - set(moe_layers))
        if self.dense == "any":
            return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return {"first_k_dense_replace": len(dense)} if self.dense == "first" else {}


MIXTRAL = Target("mixtral", "num_local_experts", "num_experts_per_tok", "intermediate_size")
QWEN2_MOE = Target(
    "qwen2_moe",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    raw=True,
    dense="any",
    shared="shared_expert",
    # A sigmoid of zero.
    shared_gain=0.5,
    shared_required=True,
    shared_field="shared_expert_intermediate_size",
    zeros=("shared_expert_gate.weight",),
)
QWEN3_MOE = Target(
    "qwen3_moe",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    raw=True,
    dense="any",
)
FLEX_OLMO = Target("flex_olmo", "num_experts", "num_experts_per_tok", "intermediate_size", raw=True)
GRANITE_MOE = Target("granitemoe", "num_local_experts", "num_experts_per_tok", "intermediate_size")
ERNIE_MOE = Target(
    "ernie4_5_moe",
    "moe_num_experts",
    "moe_k",
    "moe_intermediate_size",
    shared="shared_experts",
    shared_field="moe_num_shared_experts",
    shared_unit="experts",
    zeros=("e_score_correction_bias",),
    fixed={"moe_layer_start_index": 0},
)
GLM4_MOE = Target(
    "glm4_moe",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    dense="first",
    shared="shared_experts",
    shared_required=True,
    shared_field="n_shared_experts",
    shared_unit="experts",
    zeros=("e_score_correction_bias",),
    fixed={"num_mtp_layers": 0, "partial_rotary_factor": 1.0},
)


def _with(target: Target, **fixed: Any) -> Target:
    return replace(target, fixed={**target.fixed, **fixed})


# Dense family: the classes that have its attention and norms, the nearest first.
TARGETS: dict[str, tuple[Target, ...]] = {
    "llama": (MIXTRAL, _with(QWEN2_MOE, qkv_bias=False), _with(GLM4_MOE, use_qk_norm=False)),
    "mistral": (MIXTRAL, _with(QWEN2_MOE, qkv_bias=False), _with(GLM4_MOE, use_qk_norm=False)),
    "qwen2": (QWEN2_MOE, _with(GLM4_MOE, use_qk_norm=False, attention_bias=True)),
    "qwen3": (QWEN3_MOE, _with(GLM4_MOE, use_qk_norm=True)),
    "olmo2": (FLEX_OLMO,),
    "granite": (GRANITE_MOE,),
    "ernie4_5": (ERNIE_MOE,),
}

SANDWICH = "no MoE class of transformers has its norms before and after the feed-forward"
REASONS = {
    "gemma": "no MoE class of transformers scales embeddings and norms as it does",
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "gemma3_text": SANDWICH,
    "olmo": "olmoe normalises with RMSNorm and weights, olmo with a LayerNorm that has none",
    "olmo3": "flex_olmo has no sliding windows, which olmo3 has",
    "phi": "no MoE class of transformers has its parallel attention and feed-forward",
    "phi3": "phimoe normalises with LayerNorm, phi3 with RMSNorm",
    "gpt2": "no MoE class of transformers has learned positions and two-matrix experts with bias",
    "gpt_neox": "no MoE class of transformers has its parallel attention and feed-forward",
    "glm4": SANDWICH,
    "cohere2": "cohere2_moe has no row here: its blocks are parallel",
}


def choose_target(source: PretrainedConfig, wanted: Wanted, asked: str | None = None) -> Target:
    """The nearest MoE family that holds what is wanted, or the family `asked` for.

    Raises `UserError` with the reason for a dense family that has none and for a family that cannot
    hold it, and for settings of the source that would be lost.
    """
    family = source.model_type
    if family not in TARGETS:
        reason = REASONS.get(family, "moekit knows no MoE class with its attention and norms")
        raise UserError(
            f"{family} cannot become a MoE of a stock class: {reason}. "
            f"There are {', '.join(TARGETS)}."
        )
    _check_settings(source)
    found = TARGETS[family]
    if asked is not None:
        names = [target.family for target in found]
        if asked not in names:
            near = difflib.get_close_matches(asked, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"target {asked!r} does not fit {family}: {hint}")
        found = tuple(target for target in found if target.family == asked)
    layers = int(source.num_hidden_layers)
    refusals = {target.family: target.refusal(wanted, layers) for target in found}
    for target in found:
        if refusals[target.family] is None and not _loses_window(source, target):
            return target
    told = "; ".join(
        f"{name} {reason or 'has no sliding window'}" for name, reason in refusals.items()
    )
    raise UserError(f"No stock class holds this MoE of a {family}: {told}.")


def _check_settings(source: PretrainedConfig) -> None:
    if getattr(source, "use_sliding_window", False):
        raise UserError(
            f"this {source.model_type} uses sliding windows in some layers, which its MoE class "
            "places by another rule; only models without them are converted."
        )


def _loses_window(source: PretrainedConfig, target: Target) -> bool:
    window = getattr(source, "sliding_window", None)
    return source.model_type == "mistral" and window is not None and target.family != "mixtral"
