"""Counts of what the scheduler did; written by its thread, read by any."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from itertools import accumulate

from moekit.serve.job import Job

WINDOW = 10.0  # seconds that tokens a second are taken over
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many observations were at most each bound, as Prometheus counts them."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def cumulative(self) -> list[int]:
        """Observations up to each bound, and all of them."""
        return list(accumulate(self._counts))


class Statistics:
    """What the scheduler did since it started."""

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.generated_tokens = 0
        self.sequences: Counter[str] = Counter()  # by how they ended
        self.step_seconds = Histogram()
        self.first_token_seconds = Histogram()
        self._recent: deque[tuple[float, int]] = deque()

    def started(self, job: Job) -> None:
        """A job got a slot."""
        self.prompt_tokens += len(job.prompt)
        self.reused_tokens += job.reused_tokens

    def stepped(self, seconds: float, generated: int) -> None:
        """A step took so many seconds and generated so many tokens, counted already."""
        now = time.monotonic()
        self.steps += 1
        self.step_seconds.observe(seconds)
        self._recent.append((now, generated))
        self._forget(now)

    def first_token(self, job: Job) -> None:
        """A job generated its first token."""
        self.first_token_seconds.observe(time.monotonic() - job.submitted)

    def ended(self, how: str) -> None:
        """A sequence ended: stop, length, cancelled or error."""
        self.sequences[how] += 1

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all sequences, over the last ten seconds."""
        since = time.monotonic() - WINDOW
        return sum(tokens for at, tokens in self._recent.copy() if at >= since) / WINDOW

    def _forget(self, now: float) -> None:
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()
