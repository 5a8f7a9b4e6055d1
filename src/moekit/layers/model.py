"""`MoekitForCausalLM`: a decoder whose MLPs are MoE layers built from registered parts.

Importing `moekit.layers.model` makes it known to AutoConfig and AutoModelForCausalLM. Shapes:
B sequences, S positions, T = B * S tokens, D width, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moekit.core.errors import UserError

from .build import build_bank, build_router
from .chain import ChainLayer, RouterChain
from .config import MoekitConfig
from .context import ATTENTION, RouterContext
from .elastic_depth import check_depth, kept_layers
from .layer_recipe import LayerRecipe
from .moe import MoELayer, SharedExpert
from .pieces import Pieces, pieces
from .pool import ExpertPool
from .routed_attention import ATTENTION_ROUND, RoutedAttention, build_attention
from .routing import Routing


@dataclass
class MoekitOutput(CausalLMOutputWithPast):
    """Logits [B, S, V] and `routings`, the record of every MoE layer in order of execution."""

    routings: list[Routing] | None = None


class DenseMLP(nn.Module):
    """down(silu(gate x) * up x), of the layers without experts."""

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__()
        width, middle = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, middle, bias=False)
        self.up_proj = nn.Linear(width, middle, bias=False)
        self.down_proj = nn.Linear(middle, width, bias=False)

    def forward(self, hidden: Tensor, context: RouterContext) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def build_layer(width: int, recipe: LayerRecipe, pool: ExpertPool | None = None) -> MoELayer:
    """The MoE layer of `recipe` for hidden states of `width`, on another layer's `pool` if given.

    Raises UserError for names and values that the parts refuse.
    """
    routers: list[Any] = [
        build_router(
            recipe.router, width, recipe.num_experts, recipe.top_k, **recipe.router_options
        )
        for _ in range(1 if recipe.rounds.tied else recipe.rounds.count)
    ]
    lent = pool is not None
    if pool is None:
        pool = ExpertPool(build_bank(b.type, width, b.count, **b.options) for b in recipe.banks)
    for router in routers:
        if hasattr(router, "check_pool"):
            router.check_pool(pool)
    shared = None
    if recipe.shared is not None:
        bank = build_bank(recipe.shared.type, width, recipe.shared.count, **recipe.shared.options)
        shared = SharedExpert(width, bank, join=recipe.join)
    if recipe.rounds.count == 1:
        return MoELayer(routers[0], pool, shared, lent=lent)
    chain = RouterChain(routers, recipe.rounds.count)
    norm_width = width if recipe.rounds.norm else None
    return ChainLayer(chain, pool, shared, norm_width=norm_width, lent=lent)


class MoekitDecoderLayer(GradientCheckpointingLayer):
    """Attention and an MLP or MoE layer, each behind a norm and inside a residual."""

    def __init__(self, config: MoekitConfig, index: int, parts: Pieces, mlp: nn.Module) -> None:
        super().__init__()
        self.index = index
        if config.moe_attention is None:
            self.self_attn: Any = parts.attention(config, index)
        else:
            self.self_attn = build_attention(config.hidden_size, config.moe_attention)
        self.mlp: Any = mlp
        self.input_layernorm = parts.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = parts.norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, context: RouterContext, **attention: Any
    ) -> tuple[Tensor, RouterContext]:
        """`hidden` [B, S, D] through the layer, and the context for the next one."""
        here = context.enter(self.index)
        if isinstance(self.self_attn, RoutedAttention):
            attention = {"context": here}
        attended, weights = self.self_attn(self.input_layernorm(hidden), **attention)[:2]
        if weights is not None:
            here.carry[ATTENTION] = weights
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden), here), here


class MoekitPreTrainedModel(PreTrainedModel):
    config: MoekitConfig
    config_class = MoekitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoekitDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Small and moved by steps that bf16 would round away.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(MoekitDecoderLayer, index=0)
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Parts whose weights follow the model's initial width say so; others keep their own.
        initialise: Any = getattr(module, "init_weights_with", None)
        if initialise is not None and not module_is_loaded(module):
            initialise(self.config.initializer_range)


def module_is_loaded(module: nn.Module) -> bool:
    """Whether a checkpoint has already filled the module's own parameters."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(getattr(param, "_is_hf_initialized", False) for param in own)


class MoekitModel(MoekitPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__(config)
        parts = pieces(config)
        check_depth(config.elastic_depth, config.num_hidden_layers)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        layers: list[Any] = []
        for index, recipe in enumerate(config.layer_recipes()):
            mlp: nn.Module
            if recipe is None:
                mlp = DenseMLP(config)
            else:
                owner = layers[recipe.pool_of].mlp if recipe.pool_of != index else None
                mlp = build_layer(width, recipe, owner.pool if owner is not None else None)
            layers.append(MoekitDecoderLayer(config, index, parts, mlp))
        self.layers = nn.ModuleList(layers)
        # Parts that routers of several layers have in common; here, so that they are saved once.
        self.shared = nn.ModuleDict()
        for part in list(self.layers.modules()):
            share: Any = getattr(part, "share", None)
            if share is not None:
                share(self.shared)
        self.norm: Any = parts.norm(width, eps=config.rms_norm_eps)
        self.rotary_emb: Any = parts.rotary(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def moe_layers(self) -> list[MoELayer]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        router_context: RouterContext | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoekitOutput:
        """Hidden states [B, S, D] after the last norm, in `logits`, and the routings.

        `router_context` gives step, seed and part of training and what routers read beside the
        hidden state (`key`); batch, length, ids, types and mask are filled in here.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.config.moe_attention is not None:
            if past_key_values is not None:
                raise UserError("attention experts have no cache; call with use_cache=False")
            use_cache = False
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if seen and not all(layer.decodes for layer in self.moe_layers()):
            raise UserError(
                "a router of this model reads more than the token it routes and cannot go on from "
                "a cache; call it with use_cache=False"
            )
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            place = torch.arange(length, device=inputs_embeds.device) + seen
            position_ids = place.unsqueeze(0).expand(batch, -1)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        context = fill_context(
            router_context,
            (batch, length),
            self.training,
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
        )
        hidden = inputs_embeds
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for index in kept_layers(self.config.elastic_depth, context, len(self.layers)):
            hidden, context = self.layers[index](
                hidden,
                context,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotary,
                **kwargs,
            )
        return MoekitOutput(
            logits=self.norm(hidden), past_key_values=past_key_values, routings=context.records
        )


def fill_context(
    given: RouterContext | None,
    shape: tuple[int, int],
    training: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
) -> RouterContext:
    """The context of one forward pass: `given` (a fresh one by default) with the batch in it."""
    context = given.enter(0) if given is not None else RouterContext(*shape)
    context.batch, context.length = shape
    context.training = training
    context.position = position_ids.expand(shape).reshape(-1)
    if input_ids is not None:
        context.token_id = input_ids.reshape(-1)
    if token_type_ids is not None:
        context.token_type = token_type_ids.reshape(-1)
    if attention_mask is not None and attention_mask.dim() == 2:
        # A mask of a decoding step also covers what the cache holds.
        context.token_mask = attention_mask[:, -shape[1] :].reshape(-1).bool()
    return context


class MoekitForCausalLM(MoekitPreTrainedModel, GenerationMixin):
    """The decoder with its head; what AutoModelForCausalLM makes of a config of type moekit."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__(config)
        self.model = MoekitModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoekitOutput:
        """Logits [B, S, V]; with `labels` [B, S] also the cross-entropy of the next tokens."""
        output = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output.logits = self.lm_head(output.logits[:, kept])
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.vocab_size)
        return output

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in order."""
        return self.model.moe_layers()

    def after_step(self, routings: Sequence[Routing], counts: Sequence[Tensor]) -> None:
        """Hand each layer's router the pairs of its experts [E] in the step just done.

        `counts` belong to `routings` (of any forward pass of the step), summed over all
        micro-batches and processes.
        """
        for routing, count in zip(routings, counts, strict=True):
            block = self.model.layers[routing.layer]
            part = block.self_attn if routing.round == ATTENTION_ROUND else block.mlp
            part.after_step(count, routing.round)


AutoConfig.register("moekit", MoekitConfig, exist_ok=True)
AutoModelForCausalLM.register(MoekitConfig, MoekitForCausalLM, exist_ok=True)
