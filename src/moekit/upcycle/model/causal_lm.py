"""`UpcycledForCausalLM`: a stock dense model with routed parts that no stock class holds.

Parameters are named as in the dense model, below `base.`; those of a part lie where the part works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from moekit.core.architecture import architecture_of
from moekit.core.errors import UserError
from moekit.upcycle.model.attention_experts import AttentionExpertsPart
from moekit.upcycle.model.config import MODEL_TYPE, UpcycledConfig
from moekit.upcycle.model.pre_gated import PreGatedPart
from moekit.upcycle.model.residues import ResiduesPart
from moekit.upcycle.model.ternary import TernaryPart

# What a part is: built on the base model, which it changes; `begin(inputs)` runs before the base.
PARTS: dict[str, Callable[..., Any]] = {
    "attention-experts": AttentionExpertsPart,
    "pre-gated": PreGatedPart,
    "residues": ResiduesPart,
    "ternary": TernaryPart,
}


@dataclass
class Inputs:
    """What the forward pass was given; ids [B, S], embeddings [B, S, D], mask [B, past + S]."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None


class UpcycledForCausalLM(PreTrainedModel, GenerationMixin):
    """The model of an `UpcycledConfig`. Raises `UserError` for a kind of part it does not know.

    `causal` is False where a token's output may depend on later tokens, as it does when a whole
    sequence is routed by its mean; such a model generates but cannot be scored by its own text.
    """

    config: UpcycledConfig
    config_class = UpcycledConfig
    base_model_prefix = "base"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        kind = (config.part or {}).get("kind")
        if kind not in PARTS:
            raise UserError(
                f"config.json: part.kind is {kind!r}, not one of {', '.join(sorted(PARTS))}"
            )
        text: Any = config.text_config
        self._tell_bank()
        self.base = architecture_of(text)(text)
        self.part = PARTS[kind](self.base, config)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in this file; the bank is of a stock class.
        return True

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        super().set_experts_implementation(experts_implementation)
        self._tell_bank()

    def _tell_bank(self) -> None:
        """Hand on how experts are computed: transformers tells models, and a bank is none."""
        bank: Any = self.config.experts_config
        if bank is not None:
            bank._experts_implementation = self.config._experts_implementation

    @property
    def causal(self) -> bool:
        return bool(getattr(self.part, "causal", True))

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the base model's own; logits [B, S, V]."""
        text: Any = self.config.text_config
        if use_cache is None:
            use_cache = bool(text.use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=text)
        given = Inputs(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        self.part.begin(given)
        output: CausalLMOutputWithPast = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return output


AutoConfig.register(MODEL_TYPE, UpcycledConfig, exist_ok=True)
AutoModelForCausalLM.register(UpcycledConfig, UpcycledForCausalLM, exist_ok=True)
