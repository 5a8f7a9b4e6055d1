"""What computes logits: sequences with a cache of their own, and steps over any number of them.

Shapes: B sequences of a step, T tokens of one of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Seq(Protocol):
    """One sequence: `length` tokens are in its cache, which has room for `capacity`."""

    length: int
    capacity: int

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`; only where the runner `can_truncate`."""


class Runner(Protocol):
    """Runs a decoder-only model on its own sequences.

    Sequences are those that the runner made itself. What one gets does not depend on the others of
    a step. `kv_bytes_per_token` is what a token takes in the cache of a sequence. Without
    `can_chunk` a prompt is best given whole: its second part would go token by token.
    """

    can_chunk: bool
    can_truncate: bool
    kv_bytes_per_token: int

    def new_sequence(self, capacity: int) -> Seq:
        """An empty sequence with room for `capacity` tokens."""

    def forward(
        self,
        seqs: Sequence[Any],
        tokens: Sequence[Sequence[int]],
        all_positions: bool = False,
    ) -> Tensor | list[Tensor]:
        """Append one or more tokens to each sequence; logits after the last one, float32 [B, V].

        With `all_positions` the logits after every new token, one [T, V] for each sequence. An
        error leaves the sequences of the step unusable: drop them.
        """

    def drop(self, seq: Any) -> None:
        """Give back the memory of a sequence."""

    def close(self) -> None:
        """Give back everything; nothing may be called afterwards."""
