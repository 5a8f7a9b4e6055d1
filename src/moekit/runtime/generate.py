"""Generating text: the prompt, the room it leaves in the context, and tokens as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moekit.core.errors import UserError
from moekit.runtime.detokenize import IncrementalDecoder, decode
from moekit.runtime.engine import Engine

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and how long it took.

    `tokens_per_second` counts the tokens after the first, over the time after the first: the
    prompt is paid for in `prefill_seconds`. Beam search has no first token, so there it is all
    tokens over all seconds and `prefill_seconds` is None.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str  # "stop" at an end token, else "length"
    seconds: float
    prefill_seconds: float | None
    tokens_per_second: float


class TextStream(BaseStreamer):
    """A transformers streamer that hands over text as soon as its characters are complete.

    A character may span several tokens; it is held back until its last byte is there. `end` hands
    over whatever is left, with U+FFFD for bytes that never became a character.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.first_token_time: float | None = None
        self._decoder = IncrementalDecoder(tokenizer)
        self._on_text = on_text
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        if self.first_token_time is None:
            self.first_token_time = time.perf_counter()
        self._hand_over(self._decoder.add(value.flatten().tolist()))

    def end(self) -> None:
        self._hand_over(self._decoder.end())

    def _hand_over(self, text: str) -> None:
        if text:
            self._on_text(text)


def encode_prompt(
    tokenizer: Any, prompt: str | list[dict[str, str]], *, chat: bool | None = None
) -> BatchEncoding:
    """Token ids [1, T] of a text, or of chat messages in the model's own template.

    A text becomes one user message where `chat` is true, or None and there is a template. An empty
    text starts from the BOS or EOS token. Raises UserError for a chat without a template.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise UserError("this model has no chat template: use --no-chat")
    if chat or (chat is None and has_template):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    if encoded["input_ids"].numel():
        return encoded
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("the prompt is empty and the tokenizer has no BOS or EOS token to start at")
    ids = torch.tensor([[start]])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def room_for(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """How many tokens to generate: what was asked for, or the default or less if that fits.

    Raises UserError with the numbers where prompt and new tokens exceed the context.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or model.config.is_encoder_decoder:
        return max_new_tokens or DEFAULT_NEW_TOKENS
    room = context - prompt_tokens
    if room < 1:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and the model's context is {context}: "
            f"shorten the prompt to at most {context - 1} tokens"
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and --max-new-tokens is {max_new_tokens}, "
            f"together {prompt_tokens + max_new_tokens}; the model's context is {context}: "
            f"use --max-new-tokens {room} or less, or a shorter prompt"
        )
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, room)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    encoded: BatchEncoding,
    *,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
    **sampling: Any,
) -> Generation:
    """Continue one encoded prompt; `sampling` are options of transformers' `generate`.

    `on_text` receives the text piece by piece, or at once with beam search, which cannot stream.
    Raises UserError where the prompt and the new tokens do not fit the context.
    """
    prompt_tokens = encoded["input_ids"].shape[1]
    new_tokens = room_for(model, prompt_tokens, max_new_tokens)
    beams = sampling.get("num_beams", 1) or 1
    stream = TextStream(tokenizer, on_text or (lambda text: None)) if beams == 1 else None
    start = time.perf_counter()
    call: Any = model.generate
    output = call(
        **encoded.to(model.device), max_new_tokens=new_tokens, streamer=stream, **sampling
    )
    seconds = time.perf_counter() - start
    ids = output[0].tolist()
    # An encoder-decoder returns its start token in place of the prompt.
    ids = ids[1:] if model.config.is_encoder_decoder else ids[prompt_tokens:]
    text = decode(tokenizer, ids)
    if stream is None and on_text is not None:
        on_text(text)
    prefill = None
    rate = len(ids) / seconds
    if stream is not None and stream.first_token_time is not None:
        prefill = stream.first_token_time - start
        rate = (len(ids) - 1) / (seconds - prefill) if len(ids) > 1 else 0.0
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    reason = "stop" if ids and ids[-1] in ends else "length"
    return Generation(text, ids, prompt_tokens, reason, seconds, prefill, rate)


@dataclass(frozen=True)
class WholeModel:
    """A model that transformers runs, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any

    def generate(self, encoded: BatchEncoding, **options: Any) -> Generation:
        """As the function `generate`."""
        return generate(self.model, self.tokenizer, encoded, **options)

    def account(self) -> dict[str, Any]:
        """What is reported beside the generation: nothing more."""
        return {}


def generate_with_engine(
    engine: Engine,
    encoded: BatchEncoding,
    *,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], None] | None = None,
    do_sample: bool | None = None,
    seed: int = 0,
    **sampling: Any,
) -> Generation:
    """Continue one encoded prompt as `generate` does, by an engine with a tokenizer.

    Raises UserError as `Engine.stream` does.
    """
    prompt = encoded["input_ids"][0].tolist()
    if do_sample is None:
        do_sample = bool(engine.generation_config.do_sample)
    decoder = IncrementalDecoder(engine.tokenizer)
    hand_over = on_text or (lambda text: None)
    ids: list[int] = []
    start = time.perf_counter()
    first = start
    tokens = engine.stream(prompt, max_new_tokens, do_sample=do_sample, seed=seed, **sampling)
    for token in tokens:
        if not ids:
            first = time.perf_counter()
        ids.append(token)
        hand_over(decoder.add([token]))
    seconds = time.perf_counter() - start
    hand_over(decoder.end())
    prefill = first - start
    rate = (len(ids) - 1) / (seconds - prefill) if len(ids) > 1 else 0.0
    reason = "stop" if ids[-1] in engine.eos_token_ids else "length"
    text = decode(engine.tokenizer, ids)
    return Generation(text, ids, len(prompt), reason, seconds, prefill, rate)
