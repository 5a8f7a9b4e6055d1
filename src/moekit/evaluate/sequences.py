"""Texts as token sequences of a limited length and number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.evaluate.text import Sample

DEFAULT_SEQ_LEN = 512


def sequence_length(config: Any, asked: int | None, generate: int | None = None) -> int:
    """Tokens in one sequence; UserError where the model's context is too short for them."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    extra = generate or 0
    if not isinstance(context, int):
        return asked or DEFAULT_SEQ_LEN
    if extra >= context:
        raise UserError(f"--generate {extra} leaves no room in the model's context of {context}")
    if asked is not None and asked + extra > context:
        request = f"--seq-len {asked}"
        if extra:
            request += f" and --generate {extra} together"
        raise UserError(
            f"{request} exceed the model's context of {context}: "
            f"use --seq-len {context - extra} or less"
        )
    return asked or min(DEFAULT_SEQ_LEN, context - extra)


def sequences(
    tokenizer: Any, texts: list[Sample], length: int, max_tokens: int | None
) -> Iterator[tuple[list[int], str]]:
    """Documents as (token ids, domain), cut to `length` and to each domain's share."""
    domains = dict.fromkeys(sample.domain for sample in texts)
    share = None if max_tokens is None else max(1, max_tokens // len(domains))
    left: dict[str, float] = dict.fromkeys(domains, float("inf") if share is None else share)
    for sample in texts:
        if left[sample.domain] <= 0:
            continue
        ids = tokenizer(sample.text, verbose=False)["input_ids"]
        ids = ids[: int(min(len(ids), left[sample.domain]))]
        left[sample.domain] -= len(ids)
        for start in range(0, len(ids), length):
            yield ids[start : start + length], sample.domain
