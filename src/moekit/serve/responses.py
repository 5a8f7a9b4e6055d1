"""The JSON of answers: whole, and in chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from moekit import __version__
from moekit.serve.answer import Update
from moekit.serve.logprobs import CompletionLogprobs, TokenNames, chat_logprobs

FINGERPRINT = f"moekit-{__version__}"


class Form(Protocol):
    """How a route writes its answers."""

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Chunks that a stream of so many choices begins with."""

    def chunk(self, update: Update) -> dict[str, Any]:
        """One chunk of a stream."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that ends a stream where usage was asked for."""

    def whole(self, updates: Iterable[Update], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; one complete update for each choice."""


class _Envelope:
    """What all answers of one request share."""

    def __init__(self, prefix: str, model: str, *, usage_in_chunks: bool) -> None:
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        # OpenAI's chunks carry a null where a chunk of usage will follow.
        self._tail = {"usage": None} if usage_in_chunks else {}

    def of(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **self._tail, **more}


class ChatForm:
    """Answers of /v1/chat/completions."""

    def __init__(
        self, model: str, names: TokenNames, *, logprobs: bool, usage_in_chunks: bool
    ) -> None:
        self._envelope = _Envelope("chatcmpl", model, usage_in_chunks=usage_in_chunks)
        self._names = names
        self._logprobs = logprobs

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        role = {"role": "assistant", "content": "", "refusal": None}
        for index in range(choices):
            yield self._chunk([{"index": index, "delta": role, **_open_choice()}])

    def chunk(self, update: Update) -> dict[str, Any]:
        delta = {"content": update.piece.text} if update.piece else {}
        choice = {"index": update.index, "delta": delta, **self._rest(update)}
        return self._chunk([choice])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._chunk([], usage=usage)

    def whole(self, updates: Iterable[Update], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": update.index,
                "message": {"role": "assistant", "content": update.piece.text, "refusal": None},
                **self._rest(update),
            }
            for update in updates
        ]
        return self._envelope.of("chat.completion", choices, usage=usage)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self._envelope.of("chat.completion.chunk", choices, **more)

    def _rest(self, update: Update) -> dict[str, Any]:
        logprobs = chat_logprobs(self._names, update.piece.logprobs) if self._logprobs else None
        return {"logprobs": logprobs, "finish_reason": update.finish_reason}


class CompletionForm:
    """Answers of /v1/completions."""

    def __init__(
        self, model: str, names: TokenNames, *, logprobs: bool, usage_in_chunks: bool
    ) -> None:
        self._envelope = _Envelope("cmpl", model, usage_in_chunks=usage_in_chunks)
        self._names = names
        self._logprobs: dict[int, CompletionLogprobs] | None = {} if logprobs else None

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        return ()

    def chunk(self, update: Update) -> dict[str, Any]:
        return self._envelope.of("text_completion", [self._choice(update)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._envelope.of("text_completion", [], usage=usage)

    def whole(self, updates: Iterable[Update], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(update) for update in updates]
        return self._envelope.of("text_completion", choices, usage=usage)

    def _choice(self, update: Update) -> dict[str, Any]:
        echo, tokens = update.echo, update.piece.logprobs
        logprobs = None
        if self._logprobs is not None:
            writer = self._logprobs.setdefault(update.index, CompletionLogprobs(self._names))
            if echo is None:
                logprobs = writer.of(tokens)
            else:
                logprobs = writer.of([*echo.logprobs, *tokens], echo.first_token)
        return {
            "index": update.index,
            "text": (echo.text if echo is not None else "") + update.piece.text,
            "logprobs": logprobs,
            "finish_reason": update.finish_reason,
        }


def _open_choice() -> dict[str, Any]:
    return {"logprobs": None, "finish_reason": None}
