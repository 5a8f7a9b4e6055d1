"""Readers whose threads are native: pieces of records, checked as they come, nothing in Python."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from moekit.core.packed import checked_bytes
from moekit.ops.native import Library, library
from moekit.ops.native.reads import WHOLE, ReadRange, Reads, ranges
from moekit.runtime.readers import Load, Readers, ThreadReaders
from moekit.runtime.store import Place

# A disk is as fast with three pieces at once as with whole records, and a piece of this size is
# still in the cache of a processor when it is summed.
IN_FLIGHT = 3
PIECE = 2**21
# Prefetches in line that made others leave: the disk has the next while Python hears of one.
AHEAD = 2
# Bytes of all prefetches in line, and how often Python looks after them while nobody waits, in
# seconds: a disk does not read more within that time.
LINE, LOOK = 2**25, 0.01
# How long a signal, Ctrl-C say, may have to wait for a read that does not come, in seconds.
PATIENCE = 0.2


@runtime_checkable
class Placed(Protocol):
    """A store whose records others may read; `runtime.store.ExpertStore` is one."""

    @property
    def placed(self) -> bool:
        """Whether every expert is in one place."""

    def place(self, layer: int, expert: int) -> Place:
        """Where the records of an expert lie."""

    def arrived(self, buffer: Tensor, layer: int, expert: int, sums: Sequence[int]) -> None:
        """Count and verify what was read from there."""


def open_readers(
    store: Any,
    experts: int,
    threads: int,
    lock: threading.Lock,
    *,
    finished: Callable[[Load, BaseException | None], None],
    spare: Callable[[bool], Load | None],
) -> Readers:
    """Readers of a store with so many `experts` a layer: native ones where there are kernels and
    the store says where its records lie, or else `threads` threads that let it fetch them."""

    def read(load: Load) -> None:
        store.fetch(load.slot.view(), *divmod(load.number, experts))

    kernels = library() if isinstance(store, Placed) and store.placed else None
    if kernels is None:
        return ThreadReaders(threads, lock, read=read, finished=finished, spare=spare)
    return NativeReaders(kernels, store, experts, lock, read=read, finished=finished, spare=spare)


class NativeReaders:
    """`Readers` by native threads. Loads are handed over by the thread that polls or waits, and
    prefetches also by one that looks after them when nobody else does."""

    def __init__(
        self,
        kernels: Library,
        store: Placed,
        experts: int,
        lock: threading.Lock,
        *,
        read: Callable[[Load], object],
        finished: Callable[[Load, BaseException | None], None],
        spare: Callable[[bool], Load | None],
    ) -> None:
        self._store, self._experts, self._lock = store, experts, lock
        self._read, self._finished, self._spare = read, finished, spare
        self._reads = Reads(kernels, IN_FLIGHT, PIECE)
        self._loads: dict[int, tuple[Load, ctypes.Array[ctypes.c_uint32]]] = {}
        self._demands = self._prefetches = self._line = 0
        self._waiting = self._closed = False
        self._prefetching = threading.Condition(lock)
        self._thread: threading.Thread | None = None

    def demand(self, load: Load) -> None:
        self._submit(load)

    def cancel(self, load: Load) -> bool:
        if not self._reads.cancel(load.number):
            return False
        self._forget(load)
        return True

    def hurry(self, load: Load) -> None:
        self._reads.hurry(load.number)

    def wake(self) -> None:
        # The last demand may be read to its end while the disk begins with the next.
        while self._demands <= 1 and self._line < LINE:
            load = self._spare(self._prefetches < AHEAD)
            if load is None:
                return
            self._submit(load)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._look_after, name="expert-prefetches", daemon=True
                )
                self._thread.start()
            self._prefetching.notify()

    def poll(self) -> None:
        while self._loads and (done := self._reads.wait(0)) is not None:
            self._hand_over(*done)

    def wait(self) -> None:
        self._waiting = True
        self._lock.release()
        try:
            done = self._reads.wait(PATIENCE)
        finally:
            self._lock.acquire()
            self._waiting = False
        if done is not None:
            self._hand_over(*done)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._prefetching.notify()
        if self._thread is not None:
            self._thread.join()
        self._reads.close()

    def _look_after(self) -> None:
        with self._lock:
            while not self._closed:
                # What arrives belongs to whoever waits, who would not hear of it otherwise.
                if self._prefetches and not self._waiting:
                    self.poll()
                self._prefetching.wait(LOOK if self._prefetches else None)

    def _submit(self, load: Load) -> None:
        slot = load.slot
        try:
            place = self._store.place(*divmod(load.number, self._experts))
        # As an error in reading would.
        except Exception as failure:
            self._finished(load, failure)
            return
        sums = (ctypes.c_uint32 * len(place.sizes))()
        self._loads[load.number] = load, sums
        urgent = load.purpose != "prefetch"
        self._demands += urgent
        self._prefetches += not urgent
        self._line += 0 if urgent else slot.size
        parts = _ranges(place.sizes)
        self._reads.submit(
            load.number,
            place.file,
            place.offset,
            slot.size,
            slot.address,
            parts,
            sums,
            urgent=urgent,
        )

    def _forget(self, load: Load) -> ctypes.Array[ctypes.c_uint32]:
        urgent = load.purpose != "prefetch"
        self._demands -= urgent
        self._prefetches -= not urgent
        self._line -= 0 if urgent else load.slot.size
        return self._loads.pop(load.number)[1]

    def _hand_over(self, number: int, status: int) -> None:
        load = self._loads[number][0]
        sums, error = self._forget(load), None
        try:
            if status == WHOLE:
                layer, expert = divmod(number, self._experts)
                self._store.arrived(load.slot.view(), layer, expert, list(sums))
            else:
                # The store knows what else can be done, and how to say what is wrong.
                self._read(load)
        # Whatever went wrong belongs to whoever waits for the expert.
        except Exception as failure:
            error = failure
        self._finished(load, error)
        self.wake()


@functools.cache
def _ranges(sizes: tuple[int, ...]) -> ctypes.Array[ReadRange]:
    """The bytes that the checksums of records are of, which lie one after the other."""
    parts, at = [], 0
    for plane, size in enumerate(sizes):
        parts += [(at + start, at + stop, plane) for start, stop in checked_bytes(size)]
        at += size
    return ranges(parts)
