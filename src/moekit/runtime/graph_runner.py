"""Any decoder-only family, by its own modules in transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from moekit.core.errors import UserError
from moekit.core.view import MoEView
from moekit.runtime.cache_size import measure_cache
from moekit.runtime.lockstep import in_lockstep

# Tokens of a prompt that are run at once: what bounds the memory of activations.
CHUNK = 512
# Layers to which several tokens can be added when some are there already. A recurrent state is
# carried on by single tokens only in many families.
_CHUNKABLE = {DummyLayer, DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer}
_CROPPABLE = {DummyLayer, DynamicLayer, DynamicIndexedLayer}


# Vectors of the model's width that a token needs at one time; arrays of an expert's size that
# decoding it takes.
_VECTORS, _DECODING = 16, 6


class GraphSequence:
    """A sequence and the cache of its family."""

    def __init__(self, capacity: int, cache: Any) -> None:
        self.length = 0
        self.capacity = capacity
        self.cache = cache

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`; ValueError for more than there are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate to {length} of {self.length} tokens")
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length


class GraphRunner:
    """Runs `model` on one sequence at a time, so that none depends on the others.

    The model computes its experts itself unless a backend is attached. With one that `batches`,
    sequences go through the layers in lockstep and share its work on experts.
    """

    def __init__(self, model: PreTrainedModel, *, chunk: int = CHUNK) -> None:
        if model.config.is_encoder_decoder:
            raise UserError(
                f"{type(model).__name__} has an encoder; the engine runs decoder-only models. "
                "`moekit.load` opens this one."
            )
        self.model = model
        self.chunk = chunk
        self._stack = ExitStack()
        self._batches = False
        names = inspect.signature(type(model).forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        cache = self._new_cache()
        layers = getattr(cache, "layers", [])
        kinds = {type(layer) for layer in layers}
        plain = type(cache) is DynamicCache and bool(layers)
        mixing = any(layer.mixes_tokens for layer in MoEView(model))
        self.can_chunk = plain and kinds <= _CHUNKABLE and not mixing
        self.can_truncate = plain and kinds <= _CROPPABLE
        self.cache_size = measure_cache(model, self._new_cache)
        self.kv_bytes_per_token = self.cache_size.per_token

    def attach(self, context: AbstractContextManager[Any]) -> None:
        """Enter what acts on the model while it runs, such as a backend, until `close`."""
        self._stack.enter_context(context)
        self._batches |= getattr(context, "batches", False)

    def _new_cache(self) -> Any:
        # The others make the cache of their family in their first forward.
        supported: Any = self.model._supports_default_dynamic_cache
        if supported():
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return None

    def scratch_bytes(self, context: int, streams: int, expert_params: int) -> int:
        """What a step may work in, at most: sequences of `context` tokens, the experts of a layer
        of `expert_params` weights each."""
        config = self.model.config.get_text_config(decoder=True)
        rows = min(self.chunk, context) if self.can_chunk else context
        width = config.hidden_size
        inner = max((p.shape[0] for p in self.model.parameters() if p.ndim == 2), default=width)
        vocabulary = config.vocab_size
        top_k = max(layer.top_k for layer in MoEView(self.model))
        activations = rows * (_VECTORS * width + 3 * min(inner, 8 * width) + top_k * 4 * width)
        mask = 2 * rows * context
        if config._attn_implementation == "eager":
            mask += 3 * rows * context * config.num_attention_heads
        slope, fixed, _ = self.cache_size.largest
        grown = 2 * (slope * context + fixed)
        floats = activations + mask + 3 * streams * vocabulary + _DECODING * expert_params
        return round(4 * floats + grown)

    def new_sequence(self, capacity: int) -> GraphSequence:
        """An empty sequence with room for `capacity` tokens."""
        return GraphSequence(capacity, self._new_cache())

    @torch.inference_mode()
    def forward(
        self,
        seqs: Sequence[GraphSequence],
        tokens: Sequence[Sequence[int]],
        all_positions: bool = False,
    ) -> Tensor | list[Tensor]:
        """Append tokens to each sequence; logits as `Runner.forward` says.

        Raises ValueError for no tokens and for more than a sequence has room for.
        """
        for seq, new in zip(seqs, tokens, strict=True):
            if not 0 < len(new) <= seq.capacity - seq.length:
                raise ValueError(f"{len(new)} tokens after {seq.length} of {seq.capacity}")
        jobs = [
            partial(self._append, seq, new, all_positions)
            for seq, new in zip(seqs, tokens, strict=True)
        ]
        rows: list[Tensor] = []
        for first, last in self._groups([len(new) for new in tokens]):
            together = last - first > 1
            rows += in_lockstep(jobs[first:last]) if together else [jobs[first]()]
        return rows if all_positions else torch.cat(rows)

    def _groups(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """From where to where sequences run together: no more tokens than of one prompt."""
        first = 0
        for last in range(1, len(counts) + 1):
            full = last == len(counts) or sum(counts[first : last + 1]) > self.chunk
            if full or not self._batches:
                yield first, last
                first = last

    @torch.inference_mode()
    def _append(self, seq: GraphSequence, tokens: Sequence[int], all_positions: bool) -> Tensor:
        kept: list[Tensor] = []
        call: Any = self.model
        for piece in self._pieces(seq.length, tokens):
            output = call(
                input_ids=torch.tensor([piece], device=self.model.device),
                past_key_values=seq.cache,
                use_cache=True,
                **({} if all_positions else self._last),
            )
            seq.cache = output.past_key_values
            seq.length += len(piece)
            logits = output.logits[0] if all_positions else output.logits[0, -1:]
            if not all_positions:
                kept.clear()
            kept.append(logits.float().cpu())
        return torch.cat(kept)

    def _pieces(self, length: int, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        if self.can_chunk:
            size = self.chunk
        else:
            size = len(tokens) if length == 0 else 1
        for start in range(0, len(tokens), size):
            yield tokens[start : start + size]

    def drop(self, seq: GraphSequence) -> None:
        """Give back the cache of a sequence."""
        seq.cache = None

    def close(self) -> None:
        """Leave the model as it was."""
        self._stack.close()
