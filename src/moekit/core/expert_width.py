"""Changing the width of all routed experts in a config, whatever the family calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.errors import UserError
from moekit.core.expert_source import bank_names
from moekit.core.find import find_moe
from moekit.core.layer_spec import describe_layer

Build = Callable[[PretrainedConfig], PreTrainedModel]


def with_expert_width(config: PretrainedConfig, width: int, build: Build) -> PretrainedConfig:
    """A copy of `config` for routed experts of `width`; `build` makes a model on the meta device.

    The field is found by trying those that hold the present width. Raises `UserError` for families
    where none changes the routed experts alone.
    """
    model = build(config)
    sites = find_moe(model)
    old = describe_layer(sites[0], config).expert_width
    if old == width:
        return config
    banks = {full for site in sites for _, full in bank_names(site)}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    text = config.get_text_config(decoder=True)
    values = text.to_dict().items()
    names = [name for name, value in values if type(value) is int and value == old]
    for name in names:
        changed = copy.deepcopy(config)
        try:
            setattr(changed.get_text_config(decoder=True), name, width)
            after = build(changed).state_dict()
        except (UserError, StrictDataclassError):
            # A field of another meaning that happens to have this value.
            continue
        differ = {key for key in before if after[key].shape != before[key]}
        if differ and differ <= banks:
            return changed
    raise UserError(
        f"{config.model_type} has no config field for the width of its routed experts alone"
        + (f" ({', '.join(names)} change more)" if names else "")
        + "."
    )
