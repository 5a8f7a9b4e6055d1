"""Finding the feed-forward and attention blocks of a stock dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moekit.core.errors import UserError
from moekit.core.find import find_moe

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """A module of decoder layer `index`: `parent.name`, whose full path is `path`."""

    index: int
    parent: nn.Module
    name: str
    path: str

    @property
    def module(self) -> Any:
        return getattr(self.parent, self.name)

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


def mlp_blocks(model: nn.Module) -> list[Block]:
    """The gated feed-forward block of every decoder layer, in order.

    Raises `UserError` for a model that has experts already, and for one whose blocks are not made
    of gate, up and down projections without biases.
    """
    if find_moe(model):
        raise UserError(f"{type(model).__name__} has experts already; give a dense model.")
    found = [block for block in _layers(model) if _is_gated(block.module)]
    return _checked(found, model, f"feed-forward blocks of {', '.join(PROJECTIONS)} without biases")


def attention_blocks(model: nn.Module) -> list[Block]:
    """The attention module of every decoder layer, in order; raises as `mlp_blocks`."""
    found = [block for block in _layers(model) if block.name in ATTENTION_NAMES]
    return _checked(found, model, f"attention under one of the names {', '.join(ATTENTION_NAMES)}")


def _layers(model: nn.Module) -> Iterator[Block]:
    for path, layer in model.named_modules():
        # Decoder layers are the numbered modules that hold blocks of their own.
        if path.rpartition(".")[2].isdigit():
            for name, _ in layer.named_children():
                yield Block(int(path.rpartition(".")[2]), layer, name, f"{path}.{name}")


def _is_gated(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in PROJECTIONS]
    return all(isinstance(p, nn.Linear) and p.bias is None for p in parts)


def _checked(found: list[Block], model: nn.Module, what: str) -> list[Block]:
    config: Any = model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    if len(found) != count:
        raise UserError(
            f"{type(model).__name__}: {len(found)} of {count} layers have {what}, which this "
            "method changes; Llama-like families do."
        )
    return found
