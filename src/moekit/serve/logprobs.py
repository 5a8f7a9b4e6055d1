"""Log probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from moekit.runtime.sampling import TokenLogprobs

# Stands for minus infinity, which JSON lacks.
LOWEST = -9999.0


class TokenNames:
    """The bytes of single tokens, and names for them that can stand in JSON."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._is_byte_level = '"ByteLevel"' in json.dumps(decoder)
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def text(self, token: int) -> str:
        """The token's text, with U+FFFD where its bytes are a part of a character."""
        return self.bytes_of(token).decode(errors="replace")

    def key(self, token: int) -> str:
        """Like `text`, but `bytes:` and hexadecimal for a part of a character."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # rows that pad the output head beyond the vocabulary
            return b""
        if token in self._special:
            return name.encode()
        if self._is_byte_level:
            return b"".join(_BYTE_OF.get(character, character.encode()) for character in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if name.startswith("\u2581"):  # how SentencePiece writes a space; decoding would strip it
            return name.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()


def _bytes_by_character() -> dict[str, bytes]:
    # The alphabet of byte-level BPE: printable bytes stand for themselves, others are moved up.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = [*shown, *range(256, 256 + len(hidden))]
    pairs = zip(characters, [*shown, *hidden], strict=True)
    return {chr(character): bytes([byte]) for character, byte in pairs}


_BYTE_OF = _bytes_by_character()


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = list(names.bytes_of(token))
        return {"token": names.text(token), "logprob": max(logprob, LOWEST), "bytes": raw}

    content = [
        {**entry(t.token, t.logprob), "top_logprobs": [entry(*best) for best in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion choice, whose text offsets run on from piece to piece."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def of(self, tokens: Sequence[TokenLogprobs], first: int | None = None) -> dict[str, Any]:
        """The next tokens; before them `first`, the first of a prompt, which nothing precedes."""
        rows: list[tuple[int, float | None, dict[str, float] | None]]
        rows = [(t.token, max(t.logprob, LOWEST), self._top(t)) for t in tokens]
        if first is not None:
            rows = [(first, None, None), *rows]
        offsets = []
        for token, _, _ in rows:
            offsets.append(self._offset)
            self._offset += _characters(self._names.bytes_of(token))
        return {
            "tokens": [self._names.key(token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [top for _, _, top in rows],
            "text_offset": offsets,
        }

    def _top(self, found: TokenLogprobs) -> dict[str, float]:
        pairs = [*found.top, (found.token, found.logprob)]
        return {self._names.key(token): max(logprob, LOWEST) for token, logprob in pairs}


def _characters(raw: bytes) -> int:
    """How many characters begin in these bytes of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)
