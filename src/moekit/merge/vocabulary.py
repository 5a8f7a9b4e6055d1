"""Models with different tokenizers on one vocabulary: whose it is, and the row of each token.

As in mergekit: a token that a model lacks gets the row of the base if that has it, else of the only
model that has it, else the mean of those that have it, else zeros. V tokens of the result.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.core.source_model import SourceModel
from moekit.merge.recipe import MergeRecipe
from moekit.merge.sources import MergeSources

SOURCES = ("union", "base")
# Rows of other models that a token gets the mean of: (model, row).
Donors = list[tuple[str, int]]


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    `rows` has for every model its row of each of the V tokens, -1 for those it gets from `donors`;
    a token without donors gets zeros. `size` is V rounded up as the recipe asks.
    """

    tokenizer: Any
    rows: Mapping[str, list[int]]
    donors: Mapping[int, Donors]
    size: int

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files by name."""
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save_pretrained(scratch)
            found = (path for path in sorted(Path(scratch).rglob("*")) if path.is_file())
            return {str(path.relative_to(scratch)): path.read_bytes() for path in found}


def common_vocabulary(recipe: MergeRecipe, sources: MergeSources) -> Vocabulary:
    """The vocabulary that the recipe's `tokenizer_source` or `tokenizer` asks for.

    Raises `UserError` for an unknown source and for models without a tokenizer.
    """
    given = recipe.tokenizer
    options = given if isinstance(given, Mapping) else {"source": given}
    unknown = sorted(set(options) - {"source", "tokens", "pad_to_multiple_of"})
    if unknown:
        raise UserError(f"tokenizer: unknown key {unknown[0]!r}.")
    models = list(sources.by_name)
    tokenizers = {name: _tokenizer(sources[name]) for name in models}
    tokenizer = _chosen(str(options.get("source", "union")), recipe, sources, tokenizers)
    settings = options.get("tokens") or {}
    tokenizer.add_tokens([token for token in settings if token not in tokenizer.get_vocab()])
    ids = tokenizer.get_vocab()
    count = max(ids.values()) + 1
    owned = {name: _owned(sources[name], tokenizers[name]) for name in models}
    rows = {name: [-1] * count for name in models}
    donors: dict[int, Donors] = {}
    for token, number in ids.items():
        setting = settings.get(token)
        missing = [name for name in models if token not in owned[name]]
        forced = setting is not None and bool(setting.get("force", False))
        for name in models:
            if name not in missing and not forced:
                rows[name][number] = owned[name][token]
        if setting is not None:
            donors[number] = _given(token, setting, owned)
        elif missing:
            donors[number] = _default(token, recipe.base, owned)
    multiple = int(options.get("pad_to_multiple_of") or 1)
    return Vocabulary(tokenizer, rows, donors, -(-count // multiple) * multiple)


def with_vocabulary(sources: MergeSources, vocabulary: Vocabulary) -> None:
    """Put embeddings and output heads with the rows of `vocabulary` into every source."""
    before = {name: source.tensors for name, source in sources.by_name.items()}
    for name, source in sources.by_name.items():
        made = dict(source.tensors)
        for tensor in _vocabulary_tensors(source):
            if tensor in made:
                each = {model: held[tensor] for model, held in before.items() if tensor in held}
                shape = (vocabulary.size, *made[tensor].shape[1:])
                read = functools.partial(_read, vocabulary, name, each)
                made[tensor] = Deferred(shape, made[tensor].dtype, read)
        sources.by_name[name] = replace(source, tensors=made)


def _read(
    vocabulary: Vocabulary, model: str, each: Mapping[str, Deferred], region: Region
) -> Tensor:
    """Rows of one model's embedding over the vocabulary of the result."""
    (start, stop), *rest = region
    own, rows = each[model], vocabulary.rows[model]
    count = len(rows)
    if stop > count:
        # Rows behind the last token are the mean of all, as a token that was never seen.
        inner = _read(vocabulary, model, each, ((0, count), *rest)).mean(dim=0)
        padding = inner.expand(stop - max(start, count), *inner.shape)
        if start >= count:
            return padding.contiguous()
        return torch.cat([_read(vocabulary, model, each, ((start, count), *rest)), padding])
    made = torch.zeros([b - a for a, b in region], dtype=own.dtype)
    mine = [number for number in range(start, stop) if rows[number] >= 0]
    if mine:
        chosen: Any = own.index_select(0, torch.tensor([rows[number] for number in mine]))
        places = torch.tensor(mine) - start
        made[places] = chosen.read(((0, len(mine)), *rest))
    for number in range(start, stop):
        if rows[number] < 0:
            given = vocabulary.donors.get(number, [])
            for donor, row in given:
                made[number - start] += each[donor].read(((row, row + 1), *rest))[0].to(own.dtype)
            made[number - start] /= max(len(given), 1)
    return made


def _vocabulary_tensors(source: SourceModel) -> list[str]:
    """The parameters that have a row for each token."""
    model: Any = meta_model(source.config)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    ours = {id(p) for module in modules if module is not None for p in module.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in ours]


def _tokenizer(source: SourceModel) -> Any:
    found = load_tokenizer(source.directory)
    if found is None:
        raise UserError(f"tokenizer_source: {source.name} has no tokenizer; leave the key out.")
    return found


def _chosen(
    wanted: str, recipe: MergeRecipe, sources: MergeSources, tokenizers: Mapping[str, Any]
) -> Any:
    """A tokenizer of its own, which may be changed."""
    if wanted not in (*SOURCES, *tokenizers):
        there = ", ".join((*SOURCES, *tokenizers))
        raise UserError(f"tokenizer_source {wanted!r} is unknown; there are {there}.")
    base = wanted if wanted in tokenizers else recipe.reference
    tokenizer = _tokenizer(sources[base])
    if wanted != "union":
        return tokenizer
    for name, other in tokenizers.items():
        special = {added.content: added for added in other.added_tokens_decoder.values()}
        owned = _owned(sources[name], other)
        # By id, so that the new tokens' order does not depend on that of a hash table.
        for token in sorted(owned, key=owned.__getitem__):
            if token not in tokenizer.get_vocab():
                tokenizer.add_tokens([special.get(token, token)])
    return tokenizer


def _owned(source: SourceModel, tokenizer: Any) -> dict[str, int]:
    """The tokens of a model that have a row in its embedding."""
    size = int(source.config.get_text_config(decoder=True).vocab_size)
    return {token: row for token, row in tokenizer.get_vocab().items() if row < size}


def _default(token: str, base: str | None, owned: Mapping[str, Mapping[str, int]]) -> Donors:
    if base is not None and token in owned[base]:
        return [(base, owned[base][token])]
    return [(name, vocabulary[token]) for name, vocabulary in owned.items() if token in vocabulary]


def _given(
    token: str, setting: Mapping[str, Any], owned: Mapping[str, Mapping[str, int]]
) -> Donors:
    source = setting.get("source")
    if isinstance(source, Mapping) and source.get("kind") == "zero":
        return []
    model, wanted = source, token
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        model, wanted = source.get("model"), source.get("token", token)
        if "token_id" in source:
            return [(str(model), int(source["token_id"]))]
    if model not in owned or wanted not in owned[str(model)]:
        raise UserError(f"tokenizer: the source of {token!r} is {source!r}, which has no such row.")
    return [(str(model), owned[str(model)][wanted])]
