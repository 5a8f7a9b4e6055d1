"""Continuous batching: one thread owns the runner; sequences join and leave between its steps.

Shapes: B sequences of a step, T tokens of one of them, V vocabulary.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moekit.runtime.runner import Runner
from moekit.runtime.sampling import choose_all, token_logprobs
from moekit.runtime.schedule.batches import most_alike, token_counts
from moekit.serve.job import Closing, Event, Failed, Finished, Job, NewToken, QueueFull
from moekit.serve.slots import Slot, Slots
from moekit.serve.statistics import Statistics

# Prompt tokens whose log probabilities are taken in one step: by their bytes, at least a few.
SCORED_BYTES = 8 << 20
LEAST_SCORED = 16
# Of the queue, how many jobs are compared for a free slot, and how often one may be passed over.
WINDOW, PATIENCE = 32, 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may hold, in sequences and tokens.

    `chunk` is how many prompt tokens a step takes while others decode; four times as many where
    nobody waits for a next token, because larger steps are cheaper by token.
    """

    streams: int
    context: int
    queue: int
    chunk: int = 128


class Scheduler:
    """Runs any number of jobs on one runner, `limits.streams` of them at a time.

    Jobs wait in a queue; a free slot goes to the oldest job of the request that has the fewest
    running, or, with `alike_first`, to the job whose prompt is most alike to those running, which
    need the same experts: nobody is passed over more than `PATIENCE` times. Every step gives each
    running sequence its next token, or a share of the chunk while it is still in its prompt.
    Methods may be called from any thread. What a job gets depends neither on the others nor on
    their order, as far as the runner keeps sequences independent.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        vocab_size: int,
        reuse_prefixes: bool = True,
        alike_first: bool = False,
    ) -> None:
        self.limits = limits
        self._alike_first = alike_first
        self.statistics = Statistics()
        self._runner = runner
        self._slots = Slots(runner, limits.streams, limits.context, reuse=reuse_prefixes)
        self._score_chunk = max(LEAST_SCORED, SCORED_BYTES // (4 * vocab_size))
        self._queue: list[Job] = []
        self._closing = False
        self._cut = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return len(self._slots.running)

    @property
    def is_open(self) -> bool:
        """Whether new jobs are taken."""
        return not self._closing and self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the jobs of one request in the queue, all or none.

        Raises QueueFull where more than `limits.queue` would wait, Closing after `close`.
        """
        if self._alike_first:
            for job in jobs:
                job.counts = token_counts(job.prompt)
        with self._wake:
            if self._closing:
                raise Closing("the server is shutting down")
            if len(self._queue) + len(jobs) > self.limits.queue + len(self._slots.free):
                raise QueueFull(f"{len(self._queue)} sequences are waiting already")
            self._queue += jobs
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget jobs; a running one leaves its slot before the next step. No event follows."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._queue = [job for job in self._queue if not job.cancelled]
            self._wake.notify()

    def close(self, patience: float) -> None:
        """Take nothing new, let jobs finish for `patience` seconds, then fail them with Closing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)
        with self._wake:
            self._cut = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._prepare():
            started, before = time.monotonic(), self.statistics.generated_tokens
            try:
                self._step()
            except Exception as error:  # whatever it was, the server goes on for later requests
                traceback.print_exception(error, file=sys.stderr)
                self._fail_all(error)
            generated = self.statistics.generated_tokens - before
            self.statistics.stepped(time.monotonic() - started, generated)
        for slot in self._slots.free:
            self._slots.forget(slot)

    def _prepare(self) -> bool:
        """Settle who takes part in the next step; wait while nobody does. False: there is none."""
        with self._wake:
            while True:
                for slot, job in list(self._slots.running.items()):
                    if job.cancelled:
                        self._slots.release(slot)
                        self.statistics.ended("cancelled")
                if self._cut:
                    self._cut_all()
                self._admit()
                if self._slots.running:
                    return True
                if self._closing:
                    return False
                self._wake.wait()

    def _fail_all(self, error: Exception) -> None:
        # After an error in a step, what its sequences have in their caches is unknown.
        for slot in list(self._slots.running):
            self._end(slot, Failed(error))
            self._slots.forget(slot)

    def _cut_all(self) -> None:
        error = Closing("the server is shutting down and has cut this request")
        for job in self._queue:
            job.on_event(Failed(error))
        self._queue = []
        for slot in list(self._slots.running):
            self._end(slot, Failed(error))

    def _admit(self) -> None:
        while self._queue and self._slots.free:
            job = self._next()
            self._queue.remove(job)
            try:
                self._slots.take(job)
            except (MemoryError, RuntimeError) as error:  # how numpy and torch say: no memory
                job.on_event(Failed(error))
                self.statistics.ended("error")
            else:
                self.statistics.started(job)

    def _next(self) -> Job:
        """Who in the queue gets the next free slot."""
        running = Counter(id(job.group) for job in self._slots.running.values())
        fewest = min(running[id(job.group)] for job in self._queue)
        waiting = [job for job in self._queue if running[id(job.group)] == fewest][:WINDOW]
        if not self._alike_first or waiting[0].passed_over >= PATIENCE:
            return waiting[0]
        beside = [job.counts for job in self._slots.running.values()]
        chosen = most_alike([job.counts for job in waiting], beside)
        for job in waiting[:chosen]:
            job.passed_over += 1
        return waiting[chosen]

    def _step(self) -> None:
        """Feed every running sequence and choose the next token where its prompt is through."""
        running = self._slots.running
        scored = [slot for slot, job in running.items() if job.score_prompt and not job.new_tokens]
        plain = [slot for slot in running if slot not in scored]
        for slot in scored:
            self._score(slot)
        if not plain:
            return
        lengths = [len(slot.pending) for slot in plain]
        if self._runner.can_chunk:
            decoding = any(job.new_tokens for job in running.values())
            lengths = share(lengths, self.limits.chunk * (1 if decoding else 4))
        logits = self._forward(plain, lengths)
        rows = [row for row, slot in enumerate(plain) if not slot.pending]
        self._choose([plain[row] for row in rows], logits[rows])

    def _score(self, slot: Slot) -> None:
        """Feed a piece of a prompt whose own log probabilities are wanted."""
        job = self._slots.running[slot]
        first = len(slot.tokens)
        length = len(slot.pending)
        if self._runner.can_chunk:
            length = min(length, self._score_chunk)
        [logits] = self._forward([slot], [length], all_positions=True)
        following = job.prompt[first + 1 : first + 1 + length]
        job.prompt_logprobs += token_logprobs(
            logits[: len(following)], following, job.top_logprobs or 0
        )
        if not slot.pending:
            self._choose([slot], logits[-1:])

    def _forward(self, slots: list[Slot], lengths: list[int], all_positions: bool = False) -> Any:
        tokens = [slot.feed(length) for slot, length in zip(slots, lengths, strict=True)]
        seqs = [slot.seq for slot in slots if slot.seq is not None]
        return self._runner.forward(seqs, tokens, all_positions)

    def _choose(self, slots: list[Slot], logits: Tensor) -> None:
        """Choose a token for each sequence from logits [B, V] and end those that are done."""
        jobs = [self._slots.running[slot] for slot in slots]
        sound = logits.amax(-1).isfinite().tolist()
        wanted = [fine and job.max_new_tokens > 0 for fine, job in zip(sound, jobs, strict=True)]
        rows = [row for row, wants in enumerate(wanted) if wants]
        chosen = iter(choose_all([jobs[row].sampler for row in rows], logits[rows]))
        for row, (slot, job) in enumerate(zip(slots, jobs, strict=True)):
            if not sound[row]:
                self._end(slot, Failed(FloatingPointError("the model's logits are not finite")))
            elif not wanted[row]:
                self._end(slot, Finished("length"))
            else:
                self._append(slot, job, next(chosen), logits[row])

    def _append(self, slot: Slot, job: Job, token: int, logits: Tensor) -> None:
        logprobs = None
        if job.top_logprobs is not None:
            [logprobs] = token_logprobs(logits[None], [token], job.top_logprobs)
        slot.pending = [token]
        job.new_tokens += 1
        self.statistics.generated_tokens += 1
        if job.new_tokens == 1:
            self.statistics.first_token(job)
        job.on_event(NewToken(token, logprobs))
        if token in job.end_tokens:
            self._end(slot, Finished("stop"))
        elif job.new_tokens >= job.max_new_tokens:
            self._end(slot, Finished("length"))

    def _end(self, slot: Slot, event: Event) -> None:
        job = self._slots.running[slot]
        self._slots.release(slot)
        self.statistics.ended(event.reason if isinstance(event, Finished) else "error")
        job.on_event(event)


def share(lengths: Sequence[int], total: int) -> list[int]:
    """How many of its pending tokens each sequence feeds in a step of `total`; at least one each.

    Half of what is left goes in order of arrival, so that equal prompts do not all end at the same
    late moment; the other half is shared evenly, so that a short prompt does not wait for a long
    one.
    """
    given = [1] * len(lengths)
    spare = max(0, total - len(lengths))
    left = spare // 2
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for place, row in enumerate(order):
        extra = min(lengths[row] - 1, left // (len(order) - place))
        given[row] += extra
        left -= extra
    left += spare - spare // 2
    for row, length in enumerate(lengths):
        extra = min(length - given[row], left)
        given[row] += extra
        left -= extra
    return given
