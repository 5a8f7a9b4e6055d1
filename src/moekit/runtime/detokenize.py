"""Tokens to text while they come: a character may span several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text, without special tokens and without tidied spaces."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class IncrementalDecoder:
    """Hands over the text of one sequence as soon as its characters are complete.

    `before` are tokens that the text continues, or the last few of them; theirs is not handed over.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        if decode(tokenizer, before).endswith("\ufffd"):
            before = ()  # half a character: what completes it has to be shown
        self._ids = list(before)
        # Text is decoded from `_start`, a place some tokens back, because tokenizers treat the
        # first token of a sequence differently; text up to `_shown` has been handed over.
        self._start = 0
        self._shown = len(self._ids)

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character lacks bytes."""
        self._ids.extend(ids)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def end(self) -> str:
        """Whatever is left, with U+FFFD for bytes that never became a character."""
        text = self._new_text()
        self._start = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = decode(self._tokenizer, self._ids[self._start : self._shown])
        return decode(self._tokenizer, self._ids[self._start :])[len(shown) :]
