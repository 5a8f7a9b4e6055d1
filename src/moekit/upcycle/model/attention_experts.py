"""BAM: the attention blocks of several models as softly routed experts, and their FFNs as top-1.

A token's attention is the mean of all experts' attention, weighted by the softmax of a linear
router on the block's input. Each expert keeps keys and values of its own, or all share one set,
which costs one cache. Whether both branches read the same input (the paper's parallel block) is up
to the base family: in Cohere's they do. (BAM, arXiv 2408.08274.)

Shapes: B sequences, S positions, D width, N experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moekit.upcycle.model.blocks import attention_blocks, mlp_blocks

# What makes keys and values, under the names that families give it.
KEY_VALUE = ("k_proj", "v_proj", "k_norm", "v_norm")


class AttentionExpertsPart(nn.Module):
    """Puts N attention experts and N feed-forward experts into every layer of a base model.

    Options of the config's part: `num_experts`, and `shared_kv` (default False).
    """

    def __init__(self, base: PreTrainedModel, config: Any) -> None:
        super().__init__()
        self.num_experts = int(config.part["num_experts"])
        self.shared_kv = bool(config.part.get("shared_kv", False))
        self._text = config.text_config
        for block in mlp_blocks(base):
            block.replace(Qwen3MoeSparseMoeBlock(config.experts_config))
        layers = self._text.num_hidden_layers
        for block in attention_blocks(base):
            block.replace(
                AttentionExperts(
                    block.module, self._text.hidden_size, self.num_experts, layers, self.shared_kv
                )
            )

    def begin(self, inputs: Any) -> None:
        """Give the cache room for the keys and values of every expert."""
        cache = inputs.cache
        if cache is None or self.shared_kv:
            return
        while len(cache.layers) < self.num_experts * self._text.num_hidden_layers:
            cache.layers.extend(DynamicCache(config=self._text).layers)


class AttentionExperts(nn.Module):
    """N copies of one attention module, all computed, mixed by a router on their input [B, S, D].

    With `shared_kv` only the first copy has the projections of keys and values.
    """

    def __init__(
        self, attention: nn.Module, width: int, num_experts: int, num_layers: int, shared_kv: bool
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList([attention, *_copies(attention, num_experts - 1)])
        self.router = nn.Linear(width, num_experts, bias=False)
        self.num_layers, self.shared_kv = num_layers, shared_kv
        if shared_kv:
            for name in KEY_VALUE:
                owner = getattr(attention, name, None)
                if owner is not None:
                    kept = Kept(owner)
                    for expert in self.experts[1:]:
                        setattr(expert, name, kept)

    def gates(self, hidden_states: Tensor) -> Tensor:
        """The weights [B, S, N] of the experts, in float32."""
        return self.router(hidden_states).float().softmax(-1)

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        gates = self.gates(hidden_states).to(hidden_states.dtype)
        total = torch.zeros_like(hidden_states)
        shared = None
        for j, expert in enumerate(self.experts):
            cache: Any = None
            if past_key_values is not None and self.shared_kv:
                cache = shared = shared or SharedCache(past_key_values)
            elif past_key_values is not None:
                cache = ShiftedCache(past_key_values, j * self.num_layers)
            out = expert(hidden_states, *args, past_key_values=cache, **kwargs)[0]
            total = total + gates[..., j, None] * out
        return total, None


class Kept(nn.Module):
    """What `owner` computed last: it runs first, in another expert, on the same input."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._last: list[Tensor] = []
        owner.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._last[:] = [output]

    def forward(self, *_: Any) -> Tensor:
        return self._last[0]


class _CacheView:
    """A cache in the eyes of one attention module; what is not changed here is the cache's own."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class ShiftedCache(_CacheView):
    """Keeps keys and values `offset` layers further on."""

    def __init__(self, cache: Cache, offset: int) -> None:
        super().__init__(cache)
        self._offset = offset

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer_idx + self._offset, *args, **kwargs)


class SharedCache(_CacheView):
    """Keeps the first keys and values it gets, and gives the same to whoever comes after."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._held is None:
            self._held = self._cache.update(*args, **kwargs)
        return self._held


def _copies(attention: nn.Module, count: int) -> list[nn.Module]:
    copies = [copy.deepcopy(attention) for _ in range(count)]
    for made in copies:
        # One config for all: what is set there later, such as the kernel, is set for all.
        made.config = attention.config
    return copies
