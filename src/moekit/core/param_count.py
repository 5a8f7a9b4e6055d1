"""Count the unique parameters of a model, whole and per part; works on meta-device models.

Every parameter belongs to one of `memory.PARTS`. A tied weight counts once, persistent buffers
are counted apart, and what is not a routed expert is active for every token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moekit.core.family_table import CORRECTION_BIAS_NAMES, SPARSE_ATTENTION
from moekit.core.find import MoESite
from moekit.core.memory import PARTS

# transformers names classes by what they are, so the class names on the way to a parameter say
# whether it mixes tokens or channels.
_ATTENTION = re.compile(r"Attention|Attn|Mamba|Mixer|DeltaNet|MLA$|MoA$|ShortConv|Indexer|KDA")
_DENSE = re.compile(r"MLP|Mlp|FeedForward|FFN|LayerFF|DenseAct|MoE$|Moe$|MoeBlock$")


@dataclass(frozen=True)
class ParamCounts:
    """Numbers of parameters; `embedding` holds every embedding table and the output head.

    `active` is what one token uses: all parameters but the routed experts it does not choose.
    `buffers` are persistent buffers and no part of `total`.
    """

    total: int
    active: int
    active_no_embedding: int
    routed: int
    shared: int
    router: int
    embedding: int
    attention: int
    dense_mlp: int
    other: int
    buffers: int

    @property
    def parts(self) -> dict[str, int]:
        """Parameters per part, as the memory tables take them."""
        return {part: getattr(self, part) for part in PARTS}


@dataclass(frozen=True)
class LayerShare:
    """What a token uses of one layer's experts; `prefixes` begin the names of their tensors."""

    top_k: int
    params_per_expert: int
    prefixes: tuple[str, ...]

    def tensors(self, experts: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in experts.named_parameters() if name.startswith(self.prefixes)]


def count_params(
    model: PreTrainedModel, sites: Sequence[MoESite], layers: Sequence[LayerShare]
) -> ParamCounts:
    """Count `model`, whose MoE layers `sites` share their experts as `layers` say."""
    part_of: dict[int, str] = {}
    idle = 0
    for site, layer in zip(sites, layers, strict=True):
        if routed := _claim(part_of, "routed", layer.tensors(site.experts)):
            idle += routed - layer.top_k * layer.params_per_expert
        for _, module in site.shared:
            _claim(part_of, "shared", list(module.parameters()))
        if site.router is not None:
            _claim(part_of, "router", list(site.router.parameters()))
        own = site.block.named_parameters(recurse=False)
        _claim(part_of, "router", [p for name, p in own if name in CORRECTION_BIAS_NAMES])
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            _claim(part_of, "embedding", list(module.parameters()))
    head = model.get_output_embeddings()
    if head is not None:
        _claim(part_of, "embedding", list(head.parameters()))
    sizes: Counter[str] = Counter()
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        sizes[part_of.get(id(parameter)) or _part_by_class(name, classes)] += parameter.numel()
    total = sum(sizes.values())
    active = total - idle - _idle_attention(model)
    return ParamCounts(
        total=total,
        active=active,
        active_no_embedding=active - sizes["embedding"],
        buffers=_persistent_buffers(model),
        **{part: sizes[part] for part in PARTS},
    )


def _claim(part_of: dict[int, str], part: str, parameters: Sequence[nn.Parameter]) -> int:
    # The first claim holds: shared layers and tied weights appear at several places.
    fresh = {id(p): p for p in parameters if id(p) not in part_of}
    part_of.update(dict.fromkeys(fresh, part))
    return sum(p.numel() for p in fresh.values())


def _part_by_class(name: str, classes: dict[str, str]) -> str:
    path = name
    while path:
        path = path.rpartition(".")[0]
        if "Norm" in classes[path]:
            return "other"
        if _ATTENTION.search(classes[path]):
            return "attention"
        if _DENSE.search(classes[path]):
            return "dense_mlp"
    return "other"


def _idle_attention(model: nn.Module) -> int:
    idle = 0
    for module in model.modules():
        prefixes = SPARSE_ATTENTION.get(type(module).__name__)
        if prefixes is not None:
            tensors = LayerShare(0, 0, prefixes).tensors(module)
            attention: Any = module
            unused = attention.num_experts - attention.top_k
            idle += unused * sum(p.numel() // len(p) for p in tensors)
    return idle


def _persistent_buffers(model: nn.Module) -> int:
    buffers = {
        id(buffer): buffer.numel()
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return sum(buffers.values())
