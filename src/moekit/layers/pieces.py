"""Attention, norms and rotary positions of transformers' own families, by the family's name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from moekit.core.errors import UserError

from .names import one_of

# The family of the modules, the prefix of their class names, the fields that a config must set.
_FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3": ("qwen3_moe", "Qwen3Moe", ()),
    "mixtral": ("mixtral", "Mixtral", ()),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3",
        ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    ),
}


@dataclass(frozen=True)
class Pieces:
    """The classes of one family: each is built from a config, the attention also from a layer."""

    attention: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]


def pieces(config) -> Pieces:
    """The classes that `config.attention` names; UserError for an unknown one or unset fields."""
    name = config.attention
    one_of("attention", name, _FAMILIES)
    family, prefix, needed = _FAMILIES[name]
    unset = [field for field in needed if getattr(config, field) is None]
    if unset:
        raise UserError(f"attention {name!r} needs {', '.join(unset)}")
    heads = config.num_attention_heads, config.num_key_value_heads
    if heads[0] % heads[1]:
        raise UserError(
            f"num_attention_heads {heads[0]} is not a multiple of num_key_value_heads {heads[1]}"
        )
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return Pieces(
        getattr(module, f"{prefix}Attention"),
        getattr(module, f"{prefix}RMSNorm"),
        getattr(module, f"{prefix}RotaryEmbedding"),
    )
