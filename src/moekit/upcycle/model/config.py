"""`UpcycledConfig`: a dense model that transformers has, and what stands in place of its parts."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen3_moe import Qwen3MoeConfig

MODEL_TYPE = "moekit_upcycled"


class UpcycledConfig(PreTrainedConfig):
    """Config of `UpcycledForCausalLM`.

    `text_config` is the dense model's own. `part` says what is put into it: its "kind" and the
    options of that kind, plain JSON values. `experts_config` describes the bank of experts of the
    kinds that have one, in the words of the stock block that computes it.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "experts_config": SubConfigSpec(config_class=Qwen3MoeConfig, optional=True),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    experts_config: dict[str, Any] | PreTrainedConfig | None = None
    part: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # type: ignore[union-attr]


def experts_config(text: Any, num_experts: int, width: int, top_k: int = 1) -> Qwen3MoeConfig:
    """The bank of `num_experts` gated experts [D, `width`] beside the layers of config `text`."""
    return Qwen3MoeConfig(
        hidden_size=text.hidden_size,
        moe_intermediate_size=width,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        hidden_act=activation_of(text),
    )


def activation_of(text: Any) -> str:
    """The name of the activation in the feed-forward blocks of config `text`."""
    # Families have two names for it.
    return str(getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", "silu"))
