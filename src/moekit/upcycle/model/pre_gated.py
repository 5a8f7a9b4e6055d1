"""Read-ME: slices of a dense feed-forward block, chosen for all layers at once before the first.

A small causal transformer reads the token embeddings and chooses one expert a token, the same in
every layer, so that a server knows what will be needed before the backbone runs. An expert is a
set of the dense block's neurons: those that all experts have are computed always, its own ones
where it is chosen, and nothing is weighted. (Read-ME, arXiv 2410.19123.)

Shapes: B sequences, S positions, T = B * S tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moekit.upcycle.model.blocks import mlp_blocks
from moekit.upcycle.model.config import activation_of

HEAD_SIZE = 32


class PreGatedPart(nn.Module):
    """Puts a shared slice and E slices behind one router into every layer of a base model.

    Options of the config's part: `num_experts`, `shared_width` (neurons of the shared slice, one
    number a layer), `router_width` and `router_layers` of the router.
    """

    def __init__(self, base: PreTrainedModel, config: Any) -> None:
        super().__init__()
        text, part = config.text_config, config.part
        self.route = Route()
        self.router = PreGatingRouter(
            text, part["num_experts"], part["router_width"], part["router_layers"]
        )
        self._embed = [base.get_input_embeddings()]
        for block, shared in zip(mlp_blocks(base), part["shared_width"], strict=True):
            block.replace(SlicedBlock(config, shared, self.route))

    def begin(self, inputs: Any) -> None:
        """Route the tokens of this pass."""
        embeds = inputs.inputs_embeds
        if embeds is None:
            embeds = self._embed[0](inputs.input_ids)
        logits = self.router(
            embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            cache=inputs.cache,
        )
        self.route.logits = logits.flatten(0, 1)


class Route:
    """The logits [T, E] of the tokens of the pass that is running."""

    logits: Tensor | None = None


class PreGatingRouter(nn.Module):
    """A causal transformer of width W on token embeddings [B, S, D]: logits [B, S, E] in float32.

    Its keys and values lie in the model's own cache, behind those of the base model's layers, so
    that a token is routed once and a later one sees what it should.
    """

    def __init__(self, text: Any, num_experts: int, width: int, num_layers: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD_SIZE)
        self._first = int(text.num_hidden_layers)
        self._config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=text.max_position_embeddings,
        )
        self._config._attn_implementation = "sdpa"
        self.inward = nn.Linear(text.hidden_size, width, bias=False)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(self._config, self._first + i) for i in range(num_layers)
        )
        self.norm = LlamaRMSNorm(width)
        self.rotary_emb = LlamaRotaryEmbedding(self._config)
        self.head = nn.Linear(width, num_experts, bias=False)

    def forward(
        self,
        embeds: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        if cache is not None:
            while len(cache.layers) < self._first + len(self.layers):
                cache.layers.append(DynamicLayer())
        hidden = self.inward(embeds)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length(self._first)
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotary,
            )
        return self.head(self.norm(hidden)).float()


class PreGate(nn.Module):
    """Stands where a router stands, and tells what was decided before the first layer."""

    top_k = 1

    def __init__(self, route: Route, num_experts: int) -> None:
        super().__init__()
        self._route, self.num_experts = route, num_experts

    def routed_ahead(self) -> Tensor:
        """The logits [T, E] of the pass that is running, as `predict.gates` asks for them."""
        assert self._route.logits is not None
        return self._route.logits

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.routed_ahead()
        ids = logits.argmax(-1, keepdim=True)
        return logits, torch.ones_like(ids, dtype=hidden_states.dtype), ids


class SlicedMLP(nn.Module):
    """Some neurons of a gated feed-forward block [D, `width`]."""

    def __init__(self, text: Any, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(text.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, text.hidden_size, bias=False)
        self.act_fn = ACT2FN[activation_of(text)]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SlicedBlock(nn.Module):
    """The shared neurons plus those of the expert that was chosen; `shared` 0 for none shared."""

    def __init__(self, config: Any, shared: int, route: Route) -> None:
        super().__init__()
        self.gate = PreGate(route, config.experts_config.num_experts)
        self.experts = Qwen3MoeExperts(config.experts_config)
        self.shared_expert = SlicedMLP(config.text_config, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        _, weights, ids = self.gate(rows)
        out = self.experts(rows, ids, weights).view_as(hidden_states)
        return out if self.shared_expert is None else out + self.shared_expert(hidden_states)
