"""Threads that read expert records: what is needed now before what may be needed soon."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.runtime.slots import Slot

Purpose = Literal["demand", "prefetch", "preload"]


@dataclass(eq=False, slots=True)
class Load:
    """One record on its way into a slot, and the claims that wait for it."""

    number: int
    slot: Slot
    purpose: Purpose
    claims: list[Any] = field(default_factory=list)
    wanted: bool = False  # a prefetch that turned into a demand before it arrived


class Readers:
    """`count` threads that `read` loads and hand them to `finished` with the error, if any.

    `lock` is held in `finished` and in `spare`, which may give a load to prefetch when no demand
    is queued, and not while reading. With several threads one is kept for demands.
    """

    def __init__(
        self,
        count: int,
        lock: threading.Lock,
        *,
        read: Callable[[Load], object],
        finished: Callable[[Load, BaseException | None], None],
        spare: Callable[[], Load | None],
    ) -> None:
        self._lock, self._work = lock, threading.Condition(lock)
        self._read, self._finished, self._spare = read, finished, spare
        self._queue: deque[Load] = deque()
        self._prefetching, self._prefetchers = 0, max(1, count - 1)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, load: Load) -> None:
        """Queue a load; the lock is held."""
        self._queue.append(load)
        self._work.notify()

    def cancel(self, load: Load) -> bool:
        """Take a load out of the queue, unless it is being read already; the lock is held."""
        if load not in self._queue:
            return False
        self._queue.remove(load)
        return True

    def wake(self) -> None:
        """There may be something to prefetch; the lock is held."""
        self._work.notify()

    def close(self) -> None:
        """End the threads; reads that have begun are completed, others are dropped."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (load := self._next()) is not None:
            error = None
            try:
                self._read(load)
            # Whatever went wrong belongs to whoever waits for the expert, not to this thread.
            except BaseException as failure:
                error = failure
            with self._lock:
                self._prefetching -= load.purpose == "prefetch"
                self._finished(load, error)

    def _next(self) -> Load | None:
        with self._lock:
            while not self._closed:
                if self._queue:
                    return self._queue.popleft()
                if self._prefetching < self._prefetchers:
                    load = self._spare()
                    if load is not None:
                        self._prefetching += 1
                        return load
                self._work.wait()
        return None
