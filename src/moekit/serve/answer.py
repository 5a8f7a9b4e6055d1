"""One request while it is answered: its sequences, and what of them can be sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from moekit.runtime.sampling import Sampler, Sampling, TokenLogprobs
from moekit.serve.errors import ApiError
from moekit.serve.job import Closing, Event, Failed, Finished, Job, NewToken
from moekit.serve.pieces import Piece, PieceStream
from moekit.serve.prompts import Prompt
from moekit.serve.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks of each of its sequences."""

    sampling: Sampling
    stops: list[str]
    end_tokens: frozenset[int]
    top_logprobs: int | None = None
    echo: bool = False


@dataclass(slots=True)
class Echo:
    """A prompt that comes before its completion."""

    text: str
    first_token: int
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class Update:
    """News of the choice `index`: text, and the reason where it ended ("stop" or "length")."""

    index: int
    piece: Piece = field(default_factory=lambda: Piece(""))
    echo: Echo | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class _Choice:
    prompt: Prompt
    job: Job
    stream: PieceStream
    echo: bool
    tokens: int = 0
    finished: bool = False


class Answer:
    """The choices of one request, `n` for each prompt, numbered in that order.

    Make it on the event loop's thread, `submit` it, read its `updates`, and `cancel` it whatever
    happened.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Any, prompts: list[Prompt], n: int, asked: Asked
    ) -> None:
        self._scheduler = scheduler
        self._asked = asked
        self._prompts = prompts
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._choices = [
            _Choice(
                prompt,
                self._job(index * n + copy, prompt),
                PieceStream(tokenizer, asked.stops, prompt.before),
                asked.echo,
            )
            for index, prompt in enumerate(prompts)
            for copy in range(n)
        ]

    def _job(self, index: int, prompt: Prompt) -> Job:
        asked = self._asked
        return Job(
            prompt.ids,
            prompt.new_tokens,
            Sampler(asked.sampling, prompt.ids, index),
            on_event=lambda event: self._hear(index, event),
            group=self,
            end_tokens=asked.end_tokens,
            top_logprobs=asked.top_logprobs,
            score_prompt=asked.echo and asked.top_logprobs is not None,
        )

    def _hear(self, index: int, event: Event) -> None:
        # On the scheduler's thread. The loop is closed where the server was made to stop at once.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self) -> None:
        """Hand the jobs to the scheduler; raises its QueueFull and Closing."""
        needed = [c.job for c in self._choices if c.job.max_new_tokens or c.job.score_prompt]
        self._scheduler.submit(needed)
        for index, choice in enumerate(self._choices):
            if choice.job not in needed:
                self._events.put_nowait((index, Finished("length")))

    @property
    def size(self) -> int:
        """The number of choices."""
        return len(self._choices)

    def cancel(self) -> None:
        """Stop what is still running; harmless when everything has ended."""
        self._scheduler.cancel([c.job for c in self._choices if not c.finished])

    async def updates(self) -> AsyncIterator[Update]:
        """News as it comes, until every choice has ended; raises ApiError where one fails."""
        while not all(choice.finished for choice in self._choices):
            news: dict[int, Update] = {}
            # What came while the client was slow goes out together.
            index, event = await self._events.get()
            self._apply(event, news.setdefault(index, Update(index)))
            while not self._events.empty():
                index, event = self._events.get_nowait()
                self._apply(event, news.setdefault(index, Update(index)))
            for update in news.values():
                if update.piece or update.echo or update.finish_reason:
                    yield update

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of the completions."""
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        completion = sum(choice.tokens for choice in self._choices)
        cached = sum(choice.job.reused_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }

    def _apply(self, event: Event, update: Update) -> None:
        choice = self._choices[update.index]
        if choice.finished:  # tokens that were under way when a stop string was found
            return
        if isinstance(event, Failed):
            raise _api_error(event.error)
        if choice.echo:
            choice.echo = False
            prompt = choice.prompt
            update.echo = Echo(prompt.text or "", prompt.ids[0], choice.job.prompt_logprobs)
        if isinstance(event, NewToken):
            choice.tokens += 1
            if event.token in choice.job.end_tokens:
                return
            piece = choice.stream.add(event.token, event.logprobs)
        else:
            piece = choice.stream.end()
            update.finish_reason = event.reason
        update.piece.text += piece.text
        update.piece.logprobs += piece.logprobs
        if choice.stream.stopped:
            update.finish_reason = "stop"
            self._scheduler.cancel([choice.job])
        choice.finished = update.finish_reason is not None


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, Closing):
        return ApiError(503, f"The request was cut: {error}", code="shutting_down", retry_after=5)
    return ApiError(500, f"The model failed: {error}", code="model_error")
