"""What a method may use before tensors are merged: its models in memory, text, and a place on disk.

Everything found out is kept in a directory beside the result until that is complete, so that an
interrupted merge need not learn it again. Shapes: S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.checkpoint import Checkpoint
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.layout import deferred_tensors
from moekit.core.load import load_tokenizer
from moekit.core.skeleton import skeleton, weight_dtypes
from moekit.core.source_model import SourceModel
from moekit.evaluate.sequences import sequence_length, sequences
from moekit.evaluate.text import read_texts, shuffled
from moekit.merge.recipe import MergeRecipe
from moekit.merge.sources import MergeSources

if TYPE_CHECKING:
    from moekit.merge.plan import MergedTensor

NO_TEXT = "{} learns from text: give --data, or data in the recipe."
# A file of this name and the hash of what is merged says whose a directory is.
MARK = "moekit-merge-"
# Beside the result: the coefficients that a method has found.
COEFFICIENTS_FILE = "moekit_coefficients.json"


@dataclass
class Preparation:
    """Models, text and scratch space of one merge.

    `files` are further files for the result, by name, and `config` what its config says otherwise.
    """

    recipe: MergeRecipe
    sources: MergeSources
    scratch: Path
    seed: int
    progress: Callable[[str, int, int], None] | None = None
    files: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def told(self, what: str, done: int, total: int) -> None:
        """Report progress of a part that is called `what`."""
        if self.progress is not None:
            self.progress(what, done, total)

    def sequences(self, model: str) -> list[Tensor]:
        """Sequences [1, S] of token ids from a model's text, drawn by the seed.

        Raises `UserError` where the recipe names no text or the model has no tokenizer.
        """
        text = self.recipe.text
        files = self.recipe.files_of(model)
        if not files:
            raise UserError(NO_TEXT.format(self.recipe.method or "the recipe") + f" ({model})")
        source = self.sources[model]
        tokenizer = load_tokenizer(source.directory)
        if tokenizer is None:
            raise UserError(f"{model} has no tokenizer, so no text can be read with it.")
        length = min(text.seq_len, sequence_length(source.config, None))
        samples = shuffled(read_texts(list(files)), self.seed)
        found = sequences(tokenizer, samples, length, text.max_tokens)
        return [torch.tensor([ids]) for ids, _ in found if len(ids) > 1]

    def model(self, name: str) -> PreTrainedModel:
        """One of the models in memory, float32, in evaluation mode."""
        return assembled(self.sources[name])

    def kept(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Deferred]:
        """Tensors that `make` computes, from disk where an interrupted run has made them."""
        path = self.scratch / f"{name}.safetensors"
        if not path.exists():
            made = {key: value.contiguous() for key, value in make().items()}
            temporary = path.with_suffix(".tmp")
            save_file(made, temporary)
            os.replace(temporary, path)
        return deferred_tensors(Checkpoint(path))

    def state(self, name: str) -> Path:
        """Where the state of a search or training is kept."""
        return self.scratch / f"{name}.json"


def assembled(source: SourceModel) -> PreTrainedModel:
    """The model of `source` with its tensors in memory, float32."""
    model = skeleton(source.config, torch.float32)
    dtypes = weight_dtypes(model, torch.float32)
    held = {name: t.read().to(dtypes[name]) for name, t in source.tensors.items() if name in dtypes}
    model.load_state_dict(held, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise UserError(f"{source.name} lacks {missing[0]}, so it cannot be run.")
    return model


def prepare(tensors: Mapping[str, MergedTensor], room: Preparation) -> dict[str, MergedTensor]:
    """Let every method that wants to look at all of its tensors first do so."""
    made = dict(tensors)
    methods = {id(t.method): t.method for t in tensors.values() if t.method.prepare is not None}
    for method in methods.values():
        own = {name: t for name, t in tensors.items() if t.method is method}
        assert method.prepare is not None
        jobs = method.prepare({name: t.job for name, t in own.items()}, room)
        made |= {name: dataclasses.replace(own[name], job=job) for name, job in jobs.items()}
    return made


def begin(
    scratch: Path, identity: Mapping[str, Any], recipe: MergeRecipe, restart: bool = False
) -> None:
    """An empty directory at `scratch`, or without `restart` the one that a merge with this identity
    has left.

    Raises `UserError` for a directory that something else has made.
    """
    files = [file for model in recipe.models for file in recipe.files_of(model)]
    text = json.dumps([dict(identity), [_state(Path(file)) for file in files]], sort_keys=True)
    mark = scratch / f"{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if scratch.exists() and (restart or not mark.exists()):
        inside = list(scratch.iterdir())
        if inside and not any(path.name.startswith(MARK) for path in inside):
            raise UserError(f"{scratch} is not from moekit; move it away or name another output.")
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _state(path: Path) -> list[Any]:
    """Changes when a file of text, or one in a directory of them, does."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
