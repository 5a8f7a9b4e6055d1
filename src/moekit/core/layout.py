"""How the tensors of a checkpoint relate to the parameters of the model: names, layouts, axes.

Two layouts matter. "fused": one bank [E, ...] per layer, under the names of the model's own
parameters. "per-expert": what transformers calls the original format, one tensor per expert and
projection, where the family has that. Which names and operations lead from one to the other is
data of transformers (`conversion_mapping`); it runs here on `Deferred` tensors.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from moekit.core.checkpoint import Checkpoint
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.family_table import NUM_EXPERTS_NAMES

FUSED = "fused"
PER_EXPERT = "per-expert"
LAYOUTS = (FUSED, PER_EXPERT)


def deferred_tensors(checkpoint: Checkpoint) -> dict[str, Deferred]:
    """Every tensor of a checkpoint, read block by block when it is used."""

    infos = {name: checkpoint.info(name) for name in checkpoint.names()}
    return {
        name: Deferred(info.shape, info.dtype, functools.partial(checkpoint.get_block, name))
        for name, info in infos.items()
    }


@dataclass
class ModelTensors:
    """A checkpoint in the names and shapes of the model.

    `tensors` by parameter name; `unused` are names in the checkpoint that the model class has no
    place for (such as the layers of a multi-token prediction head); `layout` is the one of the
    checkpoint; `transforms` are the rules that matched.
    """

    tensors: dict[str, Deferred]
    unused: list[str]
    layout: str
    transforms: list[WeightTransform]


def to_model(tensors: Mapping[str, Deferred], model: PreTrainedModel) -> ModelTensors:
    """Map a checkpoint's tensors to the parameters of `model` as `from_pretrained` would.

    Raises `UserError` for parameters that are missing or have another shape.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    converter_of = {p: item for item in converters for p in item.source_patterns}
    work: dict[str, WeightTransform] = {}
    unused = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            unused.append(name)
            continue
        if pattern is None:
            item = work.setdefault(target, WeightRenaming(name, target))
            pattern = name
        else:
            item = work.setdefault(target, copy.deepcopy(converter_of[pattern]))
        source: Any = tensors[name]
        item.add_tensor(target, name, pattern, source)
    found: dict[str, Deferred] = {}
    for target, item in work.items():
        found |= _run(item, target, model)
    _check(found, expected, model)
    return ModelTensors(
        tensors=found,
        unused=unused,
        layout=PER_EXPERT if any(map(_joins_experts, work.values())) else FUSED,
        transforms=[item for item in transforms if item.was_used()],
    )


def _joins_experts(item: WeightTransform) -> bool:
    # A wildcard in a rule that builds a tensor stands for the number of an expert.
    return isinstance(item, WeightConverter) and any(".*." in p for p in item.source_patterns)


def _run(item: Any, target: str, model: PreTrainedModel) -> dict[str, Deferred]:
    sources = sorted(name for names in item.layer_targets.values() for name in names)
    try:
        made = item.convert(target, model=model, config=model.config)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{len(sources)} tensors cannot be joined to {target}: {reason} "
            f"The first is {sources[0]}; one of them may be missing or damaged."
        ) from None
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _check(
    found: Mapping[str, Deferred], expected: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> None:
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, the config says "
                f"{list(expected[name].shape)}; is a tensor missing from the checkpoint?"
            )
    # A tied weight is stored under any one of its names.
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    tied = {name: group for group in same.values() for name in group}
    missing = sorted(
        name for name in expected if not any(other in found for other in tied.get(name, [name]))
    )
    if missing:
        raise UserError(
            f"The checkpoint lacks {len(missing)} of {len(expected)} tensors of "
            f"{type(model).__name__}; the first is {missing[0]}."
        )


def to_published(
    tensors: Mapping[str, Deferred], model: PreTrainedModel, transforms: Iterable[WeightTransform]
) -> dict[str, Deferred]:
    """The tensors of `model` in the names and layout that `save_pretrained` writes by default.

    `transforms` are the rules that matched when the checkpoint was read: a prefix is put back only
    where there was one.
    """
    matched = {repr(item) for item in transforms}
    # Without this attribute transformers assumes a model that was never loaded; with the one of a
    # load from the fused layout it would keep that layout.
    default = get_model_conversion_mapping(model, add_legacy=False)
    target: Any = model
    target._weight_conversions = [
        item for item in default if not isinstance(item, PrefixChange) or repr(item) in matched
    ]
    made: dict[str, Any] = revert_weight_conversion(model, dict(tensors))
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class ExpertAxis:
    """Where the experts lie in a tensor: `axis` holds `block` consecutive entries per expert, and
    after those of all experts what belongs to none (such as choices without an expert)."""

    axis: int
    block: int

    def entries(self, kept: Sequence[int], num_experts: int, size: int) -> list[int]:
        """The entries of the axis, of length `size`, that stay when `kept` experts stay."""
        own = [e * self.block + i for e in kept for i in range(self.block)]
        return own + list(range(num_experts * self.block, size))


def expert_axes(model: PreTrainedModel, other: PreTrainedModel) -> dict[str, ExpertAxis]:
    """Every parameter and persistent buffer with an expert axis, found by comparing a model with
    the same model built for another number of experts (both may be on the meta device).

    Expert banks, router weights and biases, correction biases and whatever else a family keeps per
    expert show themselves by their shape, so no list of names is needed. Raises `UserError` where
    the experts are separate modules or the difference is no single axis.
    """
    before, after = _num_experts(model.config), _num_experts(other.config)
    old, new = model.state_dict(), other.state_dict()
    if set(old) != set(new):
        name = sorted(set(old) ^ set(new))[0]
        raise UserError(
            f"{model.config.model_type} keeps every expert in a module of its own ({name}), "
            "and dropping those is not supported yet."
        )
    axes = {}
    for name, tensor in old.items():
        pairs = list(zip(tensor.shape, new[name].shape, strict=True))
        changed = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if not changed:
            continue
        a, b = pairs[changed[0]]
        block = (a - b) // (before - after)
        if len(changed) > 1 or block * (before - after) != a - b or a < block * before:
            raise UserError(
                f"{model.config.model_type}: {name} has shape {list(tensor.shape)} with {before} "
                f"experts and {list(new[name].shape)} with {after}; that is no expert axis."
            )
        axes[name] = ExpertAxis(changed[0], block)
    return axes


def _num_experts(config: PretrainedConfig) -> int:
    values = {value for _, value in _count_fields(config)}
    if len(values) != 1:
        raise UserError(
            f"The config of {config.model_type} has {sorted(values) or 'no number'} under "
            f"{', '.join(NUM_EXPERTS_NAMES)}; one number of experts is needed to change it."
        )
    return values.pop()


def _count_fields(config: PretrainedConfig) -> list[tuple[str, int]]:
    text = config.get_text_config(decoder=True)
    values = [(name, getattr(text, name, None)) for name in NUM_EXPERTS_NAMES]
    return [(name, value) for name, value in values if isinstance(value, int)]


def with_num_experts(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """A copy of `config` for `count` routed experts in every MoE layer."""
    _num_experts(config)
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    for name, _ in _count_fields(config):
        setattr(text, name, count)
    return changed


def layer_of(name: str, paths: Mapping[str, int]) -> int | None:
    """The MoE layer that a tensor belongs to, given the module paths of the layers."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        index = paths.get(".".join(parts[:end]))
        if index is not None:
            return index
    return None
