"""A runner whose logits are a fixed function of the tokens before, with a hand on its steps."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from moekit.runtime.sampling import Sampler, Sampling
from moekit.serve.job import Event, Failed, Finished, Job, NewToken
from moekit.serve.scheduler import Limits, Scheduler

VOCAB = 320  # of tests.models.tiny_tokenizer


def logits_after(history: Sequence[int]) -> torch.Tensor:
    seed = zlib.crc32(np.array(history, dtype=np.int32).tobytes())
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class FakeSeq:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        self.dropped = False

    @property
    def length(self) -> int:
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        assert not self.dropped
        del self.tokens[length:]


class FakeRunner:
    """Checks what the protocol asks of its caller, and keeps the lengths fed in each step.

    With `gated` every step waits for a permit of `allow`.
    """

    kv_bytes_per_token = 8

    def __init__(
        self, *, can_truncate: bool = True, can_chunk: bool = True, gated: bool = False
    ) -> None:
        self.can_truncate = can_truncate
        self.can_chunk = can_chunk
        self.steps: list[list[int]] = []
        self.live: list[FakeSeq] = []
        self.fail_on: int | None = None  # a token whose feeding is an error
        self.broken: int | None = None  # a token after which logits are NaN
        self._permits = threading.Semaphore(0)
        self._gated = gated
        self.arrived = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def open_gate(self) -> None:
        self._gated = False
        self._permits.release(1)

    def new_sequence(self, capacity: int) -> FakeSeq:
        self.live.append(FakeSeq(capacity))
        return self.live[-1]

    def drop(self, seq: FakeSeq) -> None:
        seq.dropped = True
        self.live.remove(seq)

    def close(self) -> None:
        self.live = []

    def forward(
        self, seqs: Sequence[FakeSeq], tokens: Sequence[Sequence[int]], all_positions: bool = False
    ) -> Any:
        assert len(seqs) == len(tokens) == len({id(seq) for seq in seqs})
        self.arrived.release()
        if self._gated:
            self._permits.acquire()
        self.steps.append([len(new) for new in tokens])
        return self._rows(seqs, tokens, all_positions)

    def _rows(self, seqs: Any, tokens: Any, all_positions: bool) -> Any:
        found = []
        for seq, new in zip(seqs, tokens, strict=True):
            assert not seq.dropped
            assert 0 < len(new) <= seq.capacity - seq.length
            if self.fail_on in new:
                raise OSError(f"cannot read the expert of token {self.fail_on}")
            rows = []
            for token in new:
                seq.tokens.append(token)
                rows.append(logits_after(seq.tokens))
            if self.broken in new:
                rows[-1][3] = float("nan")
            found.append(torch.stack(rows))
        return found if all_positions else torch.stack([rows[-1] for rows in found])


def expected(prompt: Sequence[int], count: int, sampling: Sampling, sequence: int = 0) -> list[int]:
    """What a job must generate, by a loop over one sequence."""
    sampler = Sampler(sampling, prompt, sequence)
    history = list(prompt)
    for _ in range(count):
        history.append(sampler.choose(logits_after(history)))
    return history[len(prompt) :]


class Listener:
    """Collects the events of one job."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []

    def next(self) -> Event:
        event = self.events.get(timeout=60)
        if isinstance(event, NewToken):
            self.tokens.append(event.token)
            self.logprobs.append(event.logprobs)
        return event

    def wait(self) -> str | Exception:
        """The reason a job finished, or its error."""
        while True:
            event = self.next()
            if isinstance(event, Finished):
                return event.reason
            if isinstance(event, Failed):
                return event.error


def job(
    prompt: Sequence[int], count: int, sampling: Sampling | None = None, **fields: Any
) -> tuple[Job, Listener]:
    listener = Listener()
    sampler = Sampler(sampling or Sampling(seed=1), prompt)
    made = Job(
        list(prompt), count, sampler, listener.events.put, fields.pop("group", listener), **fields
    )
    return made, listener


@contextmanager
def scheduling(
    runner: FakeRunner,
    streams: int = 4,
    context: int = 256,
    queue: int = 64,
    chunk: int = 16,
    **options: Any,
) -> Iterator[Scheduler]:
    limits = Limits(streams, context, queue, chunk)
    scheduler = Scheduler(runner, limits, vocab_size=VOCAB, **options)
    try:
        yield scheduler
    finally:
        runner.open_gate()
        scheduler.close(0)
    assert runner.live == []
