"""Tensors of a result computed ahead of the writer, several at a time.

Reading, arithmetic and writing overlap, which is most of the time that merging by entry takes. What
is made does not depend on it: a tensor is computed by one thread, from its own random draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from moekit.merge.plan import MergedTensor

# Working memory of the tensors in flight; one that needs more alone is computed by itself.
BUDGET_BYTES = 1000 * 2**20

Pieces = list[tuple[int, Tensor]]


class Ahead:
    """The pieces of `tensors`, in their order, while the next ones are being computed."""

    def __init__(self, tensors: Mapping[str, MergedTensor], pool: ThreadPoolExecutor) -> None:
        self._tensors, self._pool = tensors, pool
        self._waiting = deque(tensors)
        self._started: dict[str, Future[Pieces]] = {}
        self._bytes = 0

    def pieces(self, name: str, first: int) -> Iterator[tuple[int, Tensor]]:
        """The rows of one tensor from `first` on; tensors must be asked for in order."""
        if name not in self._started:
            while self._waiting[0] != name:
                # An earlier run has written it.
                self._waiting.popleft()
            self._start(first)
        future = self._started.pop(name, None)
        if future is None:
            self._waiting.popleft()
            yield from self._tensors[name].pieces(first)
            return
        done = future.result()
        self._bytes -= self._tensors[name].working_bytes
        self._start(0)
        yield from done

    def _start(self, first: int) -> None:
        """Begin with as many of the next tensors as the budget allows."""
        while self._waiting:
            tensor = self._tensors[self._waiting[0]]
            if self._bytes + tensor.working_bytes > BUDGET_BYTES:
                return
            self._bytes += tensor.working_bytes
            name = self._waiting.popleft()
            self._started[name] = self._pool.submit(_computed, tensor, first)
            first = 0


class AheadTensor:
    """One tensor of `Ahead`, as a writer wants it."""

    def __init__(self, ahead: Ahead, name: str) -> None:
        self._ahead, self._name = ahead, name

    def pieces(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        return self._ahead.pieces(self._name, first)


@contextmanager
def computed_ahead(tensors: Mapping[str, MergedTensor]) -> Iterator[dict[str, AheadTensor]]:
    """`tensors` for a writer that asks for them in order; as many threads as torch may use."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    ahead = Ahead(tensors, pool)
    try:
        yield {name: AheadTensor(ahead, name) for name in tensors}
    finally:
        pool.shutdown(cancel_futures=True)
        # Each thread of the pool has set it for those that come after it.
        torch.set_num_threads(threads)


def _computed(tensor: MergedTensor, first: int) -> Pieces:
    return list(tensor.pieces(first))
