"""The axes of a dense decoder that must be permuted together, found by the names of its matrices.

The residual stream is one group for the whole model, the neurons of a feed-forward block and the
key-value heads of an attention block are one for each layer. Shapes: D width, F inner width, G
key-value heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.merge.sources import layer_of_name

QUERIES, KEYS = ("q_proj",), ("k_proj", "v_proj")
INNER_ROWS, INNER_COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)
OUTPUTS = ("o_proj",)
PER_HEAD = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor that belongs to a group, in equal blocks of a unit each."""

    group: str
    tensor: str
    axis: int


@dataclass
class DecoderGroups:
    """The groups by name with their number of units, and the axes of every tensor.

    `watched` names for each group the modules whose inputs are its units.
    """

    units: dict[str, int]
    axes: list[Axis] = field(default_factory=list)
    watched: dict[str, list[str]] = field(default_factory=dict)

    def of(self, tensor: str) -> dict[int, str]:
        """The group of each axis of a tensor."""
        return {one.axis: one.group for one in self.axes if one.tensor == tensor}

    def permuted(
        self, tensors: Mapping[str, Tensor], orders: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors with the units of every group in another order; nothing they compute
        changes."""
        made = dict(tensors)
        for one in self.axes:
            if one.tensor in made:
                made[one.tensor] = _ordered(made[one.tensor], one.axis, orders[one.group])
        return made


def _ordered(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    blocks = tensor.unflatten(axis, (len(order), -1))
    return blocks.index_select(axis, order).flatten(axis, axis + 1)


def decoder_groups(model: PreTrainedModel, names: Sequence[str]) -> DecoderGroups:
    """The groups of a dense decoder with separate q, k, v, o and gate, up, down matrices.

    Raises `UserError` for MoE models and for decoders that are built otherwise.
    """
    config = model.config.get_text_config(decoder=True)
    if find_moe(model):
        raise UserError("pleas merges dense models; for MoE there is align: experts.")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    groups = DecoderGroups({"residual": config.hidden_size})
    for name in names:
        found = layer_of_name(name)
        if found is None:
            _outside(groups, name)
            continue
        layer = found[1]
        groups.units[f"inner {layer}"] = config.intermediate_size
        groups.units[f"heads {layer}"] = heads
        _inside(groups, name, layer)
    return groups


def _outside(groups: DecoderGroups, name: str) -> None:
    if "embed" in name or name.endswith("lm_head.weight"):
        groups.axes.append(Axis("residual", name, 1))
    elif "norm" in name:
        groups.axes.append(Axis("residual", name, 0))
        groups.watched.setdefault("residual", []).append(name.rpartition(".")[0])
    else:
        raise UserError(f"pleas does not know what the axes of {name} are.")


def _inside(groups: DecoderGroups, name: str, layer: int) -> None:
    module, _, leaf = name.rpartition(".")
    kind = module.rpartition(".")[2]
    inner, heads = f"inner {layer}", f"heads {layer}"
    rows = {
        **dict.fromkeys(INNER_ROWS, inner),
        **dict.fromkeys((*QUERIES, *KEYS), heads),
        **dict.fromkeys((*INNER_COLUMNS, *OUTPUTS), "residual"),
    }
    columns = {
        **dict.fromkeys((*INNER_ROWS, *QUERIES, *KEYS), "residual"),
        **dict.fromkeys(INNER_COLUMNS, inner),
        **dict.fromkeys(OUTPUTS, heads),
    }
    if kind in PER_HEAD:
        # Shared by all heads, and the entries of a head keep their order.
        return
    if kind in rows:
        groups.axes.append(Axis(rows[kind], name, 0))
        if leaf == "weight":
            groups.axes.append(Axis(columns[kind], name, 1))
            if kind in (*INNER_COLUMNS, *OUTPUTS):
                groups.watched[columns[kind]] = [module]
    elif "norm" in kind:
        groups.axes.append(Axis("residual", name, 0))
        groups.watched.setdefault("residual", []).append(module)
    else:
        raise UserError(f"pleas does not know what the axes of {name} are.")


def unit_similarity(correlation: Tensor, units: int) -> Tensor:
    """Similarity [G, G] of blocks of entries from the correlations of entries: of entries that
    have the same place in their block."""
    size = len(correlation) // units
    blocks = correlation.unflatten(1, (units, size)).unflatten(0, (units, size))
    return torch.einsum("ajbj->ab", blocks)
