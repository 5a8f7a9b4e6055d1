"""From the tokens of one sequence to pieces of text that can be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit.runtime.detokenize import IncrementalDecoder
from moekit.runtime.sampling import TokenLogprobs
from moekit.serve.stop_strings import StopStrings


@dataclass(slots=True)
class Piece:
    """Some text, and the log probabilities of its tokens where they were asked for."""

    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs)


class PieceStream:
    """Text as soon as its characters are complete and no stop string can come of them.

    `before` are the tokens that the text continues. Log probabilities leave with the text of their
    token; those of a stop string never do.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], before: Sequence[int] = ()) -> None:
        self._decoder = IncrementalDecoder(tokenizer, before)
        self._stops = StopStrings(stops)
        self._decoded = 0
        self._shown = 0
        # (where the token's text begins, where it ends once that is known, its log probabilities)
        self._pending: list[tuple[int, int | None, TokenLogprobs]] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: nothing more will come."""
        return self._stops.stopped

    def add(self, token: int, logprobs: TokenLogprobs | None) -> Piece:
        """The piece that a token completes; often empty."""
        if logprobs is not None:
            self._pending.append((self._decoded, None, logprobs))
        return self._piece(self._decoder.add([token]))

    def end(self) -> Piece:
        """What is left when no token follows."""
        piece = self._piece(self._decoder.end())
        if not self.stopped:
            piece.text += self._stops.end()
            piece.logprobs += [logprobs for _, _, logprobs in self._pending]
        self._pending = []
        return piece

    def _piece(self, decoded: str) -> Piece:
        self._decoded += len(decoded)
        if decoded:
            self._pending = [
                (start, self._decoded if end is None else end, logprobs)
                for start, end, logprobs in self._pending
            ]
        text = self._stops.add(decoded)
        self._shown += len(text)
        # Both ends grow along the list, so those that leave are its first ones.
        count = sum(self._leaves(start, end) for start, end, _ in self._pending)
        leaving, self._pending = self._pending[:count], self._pending[count:]
        return Piece(text, [logprobs for _, _, logprobs in leaving])

    def _leaves(self, start: int, end: int | None) -> bool:
        if self.stopped:
            return start < self._shown
        return end is not None and end <= self._shown
