"""Measuring what a converter says of step 0: source and result on the same tokens."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.deferred import Deferred
from moekit.core.machine import available_memory
from moekit.core.seeds import generator
from moekit.core.skeleton import skeleton
from moekit.core.source_model import SourceModel
from moekit.upcycle.converter import Made

SEQUENCES, TOKENS = 2, 32
# What else runs on the machine keeps half of its free memory.
SHARE = 0.5


def measure_start(source: SourceModel, made: Made, seed: int) -> float | None:
    """Largest difference of a logit between result and source, as a share of the largest logit.

    Both are run in float32 on the same random tokens, one after the other; the source with what
    `made.start` changes of its config. None where either does not fit in memory.
    """
    sizes = [
        sum(tensor.numel() for tensor in tensors.values())
        for tensors in (source.tensors, made.tensors)
    ]
    if max(sizes) * torch.float32.itemsize > SHARE * available_memory():
        return None
    text = source.config.get_text_config(decoder=True)
    draw = generator(seed, "tokens of the check at step 0")
    tokens = torch.randint(0, text.vocab_size, (SEQUENCES, TOKENS), generator=draw)
    changed = copy.deepcopy(source.config)
    for name, value in made.start.source_changes.items():
        setattr(changed.get_text_config(decoder=True), name, value)
    before = _logits(changed, source.tensors, tokens)
    after = _logits(made.config, made.tensors, tokens)
    return float((after - before).abs().max() / before.abs().max())


def in_memory(config: PretrainedConfig, tensors: Mapping[str, Deferred]) -> PreTrainedModel:
    """The model of `config` with these tensors, in float32 and evaluation mode."""
    model = skeleton(config, torch.float32)
    values = {name: _float(tensor.read()) for name, tensor in tensors.items()}
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    return model


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.inference_mode()
def _logits(config: PretrainedConfig, tensors: Mapping[str, Deferred], tokens: Tensor) -> Tensor:
    model: Any = in_memory(config, tensors)
    found: Tensor = model(tokens).logits
    del model
    gc.collect()
    return found
