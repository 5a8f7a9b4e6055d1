"""Reading the resident part: several threads keep the disk busy, straight to where it stays."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moekit.core.packed import PAGE
from moekit.runtime.pages import page_aligned

# A read is one piece; tensors are read so many bytes before somebody asks for them.
PIECE_BYTES, AHEAD_BYTES = 2**23, 2**26
THREADS = 2
# Fills memory from an offset of a file on; the file may end after the last argument.
Read = Callable[[str, int, Tensor, int], object]


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: bytes `start` to `stop` of `file`."""

    name: str
    file: str
    start: int
    stop: int

    @property
    def first(self) -> int:
        """Where its first page begins."""
        return self.start - self.start % PAGE

    @property
    def pages(self) -> int:
        """Bytes of all pages that it touches."""
        return -(-self.stop // PAGE) * PAGE - self.first

    def shares_page(self, after: Span) -> bool:
        """Whether one that begins later begins within the pages of this one."""
        return self.file == after.file and after.first < self.first + self.pages


class Image:
    """One piece of memory for tensors that stay as they are stored: the pages of their files that
    they touch, one after the other."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._starts: dict[Span, int] = {}
        total, before = 0, None
        for span in spans:
            start = total
            if before is not None and before.shares_page(span):
                start = self._starts[before] + span.first - before.first
            self._starts[span] = start
            total, before = max(total, start + span.pages), span
        self._memory = page_aligned(total, huge=True)

    def of(self, span: Span) -> Tensor:
        """The pages of a tensor."""
        start = self._starts[span]
        return self._memory[start : start + span.pages]


class ResidentReader:
    """Iterates over (span, bytes [n]) in the order of `spans`, each in memory of its own, or all in
    one `Image` with `whole`. To be used once; raises what `read` raises.
    """

    def __init__(self, spans: Sequence[Span], read: Read, *, whole: bool) -> None:
        self._spans, self._read = spans, read
        self._image = Image(spans) if whole else None
        self._work = threading.Condition()
        self._memory: dict[int, Tensor] = {}
        self._missing = [-(-span.pages // PIECE_BYTES) for span in spans]
        self._pieces = (
            (number, start)
            for number, span in enumerate(spans)
            for start in range(0, span.pages, PIECE_BYTES)
        )
        # Bytes that were taken up beyond the tensor that is asked for. An image is there anyway.
        self._ahead, self._most = 0, math.inf if whole else AHEAD_BYTES
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Iterator[tuple[Span, Tensor]]:
        threads = [
            threading.Thread(target=self._run, name=f"resident-reader-{n}", daemon=True)
            for n in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        try:
            for number, span in enumerate(self._spans):
                begin = span.start - span.first
                yield span, self._wait(number)[begin : begin + span.stop - span.start]
        finally:
            with self._work:
                self._closed = True
                self._work.notify_all()
            for thread in threads:
                thread.join()

    def _wait(self, number: int) -> Tensor:
        with self._work:
            self._ahead -= self._spans[number].pages
            self._work.notify_all()
            while self._missing[number]:
                if self._error is not None:
                    raise self._error
                self._work.wait()
            made = self._place(number)
            del self._memory[number]
            return made

    def _place(self, number: int) -> Tensor:
        """The pages of a tensor; the lock is held."""
        if number not in self._memory:
            span = self._spans[number]
            image = self._image
            self._memory[number] = page_aligned(span.pages) if image is None else image.of(span)
        return self._memory[number]

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            number, start, into = taken
            span, error = self._spans[number], None
            try:
                self._read(span.file, span.first + start, into, span.stop)
            # Whatever went wrong belongs to whoever waits for the tensor, not to this thread.
            except BaseException as failure:
                error = failure
            with self._work:
                if error is None:
                    self._missing[number] -= 1
                else:
                    self._error, self._closed = error, True
                self._work.notify_all()

    def _next(self) -> tuple[int, int, Tensor] | None:
        with self._work:
            while self._ahead >= self._most and not self._closed:
                self._work.wait()
            piece = None if self._closed else next(self._pieces, None)
            if piece is None:
                return None
            number, start = piece
            into = self._place(number)[start : start + PIECE_BYTES]
            self._ahead += len(into)
            return number, start, into
