"""`MoekitConfig`: a decoder of transformers' own attention with moekit's MoE layers."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .layer_recipe import LayerRecipe, read_layers


@strict
class MoekitConfig(PreTrainedConfig):
    """The config of `MoekitForCausalLM`.

    `attention` names the family whose attention, norm and rotary modules are used, and the fields
    that such an attention reads have that family's names: "qwen3" (grouped queries with a norm on
    queries and keys), "mixtral" (grouped queries) or "deepseek_v3" (latent attention). `moe` says
    what stands in the layers in place of an MLP of `intermediate_size`; see `layer_recipe`.
    `moe_attention` puts attention experts in place of the attention of every layer; see
    `routed_attention.build_attention`.
    `router_aux_loss_coef` scales the balance loss of the trainer, for routers that do not balance
    themselves by a bias. `elastic_depth` draws layers to skip; see `elastic_depth.kept_layers`.
    """

    model_type = "moekit"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "routings"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    attention: str = "qwen3"
    moe: dict | None = None
    moe_attention: dict | None = None
    router_aux_loss_coef: float = 0.01
    elastic_depth: dict | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention == "deepseek_v3":
            # Only a part of a latent head is rotated, and transformers' rotary module reads it so.
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def layer_recipes(self) -> list[LayerRecipe | None]:
        """What stands in each layer; None for a dense one. UserError for a wrong `moe`."""
        return read_layers(self.moe, self.num_hidden_layers)
