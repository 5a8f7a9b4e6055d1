"""A model that others are made from: its directory, its config, and its tensors, lazily."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moekit.core.architecture import meta_model, read_config
from moekit.core.checkpoint import Checkpoint, read_json
from moekit.core.deferred import Deferred
from moekit.core.dequant import dequantize, quantization_of
from moekit.core.layout import deferred_tensors, to_model
from moekit.core.load import find_model
from moekit.core.task_vector import HEAD_FILE, TaskVectorHead, add_task_vector


@dataclass(frozen=True)
class SourceModel:
    """One model: its directory, `config.json` as it is, its config, and tensors by name."""

    name: str
    directory: Path
    raw: dict[str, Any]
    config: PretrainedConfig
    checkpoint: Checkpoint
    tensors: Mapping[str, Deferred]

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)


def open_source(name: str, directory: Path, stack: ExitStack) -> SourceModel:
    """Open a model by the names of its checkpoint, until `stack` closes; a quantised one is decoded
    as it is read. Raises `UserError` for a checkpoint or config that cannot be read."""
    if (directory / HEAD_FILE).is_file():
        return _open_task_vector(name, directory, stack)
    raw = read_json(directory / "config.json")
    checkpoint = stack.enter_context(Checkpoint(directory))
    tensors = deferred_tensors(checkpoint)
    quantization = quantization_of(raw)
    if quantization is not None:
        tensors = dequantize(tensors, quantization)
    return SourceModel(name, directory, raw, read_config(directory), checkpoint, tensors)


def _open_task_vector(name: str, directory: Path, stack: ExitStack) -> SourceModel:
    """A fine-tune that is stored as its base and a compressed difference."""
    head = TaskVectorHead.read(directory)
    base = open_source(head.base, find_model(head.base), stack)
    tensors = base.tensors
    if not set(head.counts) <= set(tensors):
        # Compressed beside a model of another layout, so by the names of parameters.
        tensors = to_model(tensors, meta_model(base.config)).tensors
    stored, made = add_task_vector(directory, tensors, base.checkpoint)
    stack.enter_context(stored)
    raw = read_json(directory / "config.json")
    return SourceModel(name, directory, raw, read_config(directory), stored, made)
