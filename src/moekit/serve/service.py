"""What the routes share: the engine, its scheduler, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from moekit.core.errors import UserError
from moekit.core.seeds import derive_seed
from moekit.runtime.engine import Engine
from moekit.runtime.sampling import Sampling
from moekit.serve.answer import Answer, Asked
from moekit.serve.errors import ApiError
from moekit.serve.job import Closing, QueueFull
from moekit.serve.logprobs import TokenNames
from moekit.serve.prompts import Prompt, chat_prompt, completion_prompts
from moekit.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from moekit.serve.scheduler import Limits, Scheduler

# Seconds after which a client that was turned away may find the queue shorter.
RETRY_AFTER = 2
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)

Result = TypeVar("Result")


class Service:
    """One model behind the API.

    `seed` is what requests without one get theirs from, each another. `alike_first` runs
    requests together whose prompts are alike, for they need the same experts.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        queue: int,
        chunk: int = 128,
        reuse_prefixes: bool = True,
        seed: int = 0,
        alike_first: bool = False,
    ) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.vocab_size: int = engine.config.get_text_config(decoder=True).vocab_size
        self.limits = Limits(engine.streams, engine.max_context, queue, chunk)
        self.scheduler = Scheduler(
            engine.runner,
            self.limits,
            vocab_size=self.vocab_size,
            reuse_prefixes=reuse_prefixes,
            alike_first=alike_first,
        )
        self.names = TokenNames(engine.tokenizer)
        self._seed = seed
        self._number = itertools.count()
        self._tokenizing = asyncio.Lock()

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 for a model that is not served here."""
        if name != self.name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def complete(self, request: CompletionRequest) -> Answer:
        """Queue a request for completions; raises ApiError."""
        self.check_model(request.model)
        tokenizer, context = self.engine.tokenizer, self.limits.context
        prompts = await self._tokenize(
            lambda: completion_prompts(tokenizer, request, context, self.vocab_size)
        )
        return self._start(request, prompts, request.logprobs, echo=request.echo)

    async def chat(self, request: ChatRequest) -> Answer:
        """Queue a request for a chat's next message; raises ApiError."""
        self.check_model(request.model)
        tokenizer, context = self.engine.tokenizer, self.limits.context
        prompt = await self._tokenize(lambda: chat_prompt(tokenizer, request, context))
        top = (request.top_logprobs or 0) if request.logprobs else None
        return self._start(request, [prompt], top)

    async def _tokenize(self, work: Callable[[], Result]) -> Result:
        # A long prompt takes long enough to hold up every stream, if it were done on the loop.
        async with self._tokenizing:
            return await asyncio.to_thread(work)

    def _start(
        self,
        request: GenerationRequest,
        prompts: list[Prompt],
        top_logprobs: int | None,
        *,
        echo: bool = False,
    ) -> Answer:
        most = self.limits.streams + self.limits.queue
        if len(prompts) * request.n > most:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n {request.n} make {len(prompts) * request.n} "
                f"sequences; this server takes at most {most} at once",
                param="n" if request.n > 1 else "prompt",
            )
        ends = frozenset() if request.ignore_eos else frozenset(self.engine.eos_token_ids)
        asked = Asked(self._sampling(request), request.stop, ends, top_logprobs, echo)
        answer = Answer(self.scheduler, self.engine.tokenizer, prompts, request.n, asked)
        try:
            answer.submit()
        except QueueFull as error:
            message = f"The server is busy: {error}. Try again later."
            raise ApiError(503, message, code="queue_full", retry_after=RETRY_AFTER) from error
        except Closing as error:
            message = f"No new requests: {error}."
            raise ApiError(503, message, code="shutting_down", retry_after=RETRY_AFTER) from error
        return answer

    def _sampling(self, request: GenerationRequest) -> Sampling:
        seed = request.seed
        if seed is None:
            seed = derive_seed(self._seed, f"request {next(self._number)}")
        options: dict[str, Any] = {name: getattr(request, name) for name in SAMPLING_FIELDS}
        try:
            return self.engine.sampling(
                True, seed=seed, logit_bias=self._logit_bias(request), **options
            )
        except UserError as error:
            raise ApiError(400, str(error)) from error

    def _logit_bias(self, request: GenerationRequest) -> dict[int, float]:
        bias = {}
        for key, value in request.logit_bias.items():
            if not key.isdecimal() or int(key) >= self.vocab_size:
                raise ApiError(
                    400,
                    f"logit_bias has {key[:40]!r}, which is no token id below {self.vocab_size}",
                    param="logit_bias",
                )
            bias[int(key)] = value
        return bias
