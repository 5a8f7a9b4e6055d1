"""Threads that read expert records: what is needed now before what may be needed soon."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

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


class Readers(Protocol):
    """Reads loads in the background and hands them to `finished(load, error or None)`.

    The lock that it was made with is held by whoever calls any method but `close`, in `finished`,
    and in `spare(evicts)`, which may give a load to prefetch where no demand waits, and let others
    leave for it if `evicts`.
    """

    def demand(self, load: Load) -> None:
        """Queue a load that somebody waits for."""

    def cancel(self, load: Load) -> bool:
        """Take a load out of the queue, unless it is being read already."""

    def hurry(self, load: Load) -> None:
        """Somebody waits for what was a prefetch."""

    def wake(self) -> None:
        """There may be something to prefetch."""

    def poll(self) -> None:
        """Hand over what has been read."""

    def wait(self) -> None:
        """Let go of the lock until something was handed over, or `close` was called, or for a
        moment."""

    def close(self) -> None:
        """End reading; reads that have begun are completed, others are dropped."""


class ThreadReaders:
    """`Readers` of `count` threads that `read` loads. With several, one is kept for demands."""

    def __init__(
        self,
        count: int,
        lock: threading.Lock,
        *,
        read: Callable[[Load], object],
        finished: Callable[[Load, BaseException | None], None],
        spare: Callable[[bool], Load | None],
    ) -> None:
        self._lock, self._work = lock, threading.Condition(lock)
        self._arrived = threading.Condition(lock)
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
        self._queue.append(load)
        self._work.notify()

    def cancel(self, load: Load) -> bool:
        if load not in self._queue:
            return False
        self._queue.remove(load)
        return True

    def hurry(self, load: Load) -> None:
        """Prefetches are being read as soon as they are loads."""

    def wake(self) -> None:
        self._work.notify()

    def poll(self) -> None:
        """Whoever has read a load hands it over."""

    def wait(self) -> None:
        self._arrived.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._arrived.notify_all()
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
                self._arrived.notify_all()

    def _next(self) -> Load | None:
        with self._lock:
            while not self._closed:
                if self._queue:
                    return self._queue.popleft()
                if self._prefetching < self._prefetchers:
                    load = self._spare(True)
                    if load is not None:
                        self._prefetching += 1
                        return load
                self._work.wait()
        return None
