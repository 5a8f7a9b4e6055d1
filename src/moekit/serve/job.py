"""One sequence that the scheduler is asked to continue, and what it reports about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit.runtime.sampling import Sampler, TokenLogprobs


class QueueFull(Exception):
    """More sequences wait already than the scheduler lets wait."""


class Closing(Exception):
    """The scheduler is shutting down: it takes nothing new, or has cut what was running."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token was generated; with its log probabilities where they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing follows: "stop" after an end token, "length" after as many as were asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing follows, because of an error."""

    error: Exception


Event = NewToken | Finished | Failed


@dataclass(eq=False, slots=True)
class Job:
    """A prompt of one or more tokens, and how to continue it.

    `on_event` is called on the scheduler's thread and must return at once. An end token is
    reported like any other, then `Finished`. `group` is what fairness counts by: the jobs of one
    request share it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    on_event: Callable[[Event], None]
    group: object
    end_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None  # None: no log probabilities
    score_prompt: bool = False
    # Filled in by the scheduler.
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt[1:]
    reused_tokens: int = 0
    new_tokens: int = 0
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    counts: Any = None  # of the prompt's tokens
    passed_over: int = 0
