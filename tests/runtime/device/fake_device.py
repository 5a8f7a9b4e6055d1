"""A device whose work is done late and in any order that its streams and marks allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Work:
    run: Callable[[], object]
    after: FakeMark | None = None


@dataclass
class Stream:
    queue: list[Work] = field(default_factory=list)
    position: int = 0

    def step(self) -> bool:
        """Do the next work; False where there is none or it must wait."""
        if self.position == len(self.queue):
            return False
        work = self.queue[self.position]
        if work.after is not None and not work.after.reached:
            return False
        work.run()
        self.position += 1
        return True


class FakeMark:
    def __init__(self, device: FakeDevice, stream: Stream) -> None:
        self._device, self._stream, self._position = device, stream, len(stream.queue)

    @property
    def reached(self) -> bool:
        return self._stream.position >= self._position

    def done(self) -> bool:
        self._device.go_on()
        return self.reached

    def wait(self) -> None:
        while not self.reached:
            assert self._device.step(), "both streams wait for each other"


class FakeDevice:
    """Works whenever it is asked something, as much as a coin says; `order` prefers one stream.

    With `immediate` computing happens outside of it, at once, so that what must be there is.
    """

    def __init__(self, seed: int = 0, order: str = "any", immediate: bool = False) -> None:
        self.torch_device = torch.device("cpu")
        self.copies, self.computing = Stream(), Stream()
        self.copied_bytes = 0
        self.pinned: dict[int, int] = {}
        self._random, self._order, self._immediate = random.Random(seed), order, immediate
        self.limited = None

    # -- the seam --

    def memory(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> None:
        self.pinned[memory.data_ptr()] = memory.nbytes

    def unpin(self, memory: Tensor) -> None:
        while self.step():
            pass
        del self.pinned[memory.data_ptr()]

    def copy(self, target: Tensor, source: Tensor, after: FakeMark | None) -> FakeMark:
        begin = source.data_ptr()
        assert any(a <= begin and begin + source.nbytes <= a + n for a, n in self.pinned.items())
        # In two halves: what looks at the target in between sees neither.
        half = len(target) // 2
        self.copies.queue.append(Work(lambda: target[:half].copy_(source[:half]), after))
        self.copies.queue.append(Work(lambda: target[half:].copy_(source[half:])))
        self.copied_bytes += source.nbytes
        return FakeMark(self, self.copies)

    def follow(self, mark: FakeMark) -> None:
        self.computing.queue.append(Work(lambda: None, mark))
        if self._immediate:
            mark.wait()
            self.step_through(self.computing)
        self.go_on()

    def mark(self) -> FakeMark:
        self.go_on()
        return FakeMark(self, self.computing)

    def free_bytes(self) -> tuple[int, int]:
        return 2**40, 2**40

    def limit(self, nbytes: int) -> None:
        self.limited = nbytes

    def peak_bytes(self) -> int:
        return 0

    # -- the test's side --

    def launch(self, run: Callable[[], object]) -> None:
        """Compute something, some time."""
        self.computing.queue.append(Work(run))
        self.go_on()

    def go_on(self) -> None:
        while self._random.random() < 0.4 and self.step():
            pass

    def step(self) -> bool:
        streams = [self.copies, self.computing]
        if self._order == "computing first" or (
            self._order == "any" and self._random.random() < 0.5
        ):
            streams.reverse()
        return any(stream.step() for stream in streams)

    def finish(self) -> None:
        """Do all that is left."""
        while self.step():
            pass
        assert all(s.position == len(s.queue) for s in (self.copies, self.computing))

    @staticmethod
    def step_through(stream: Stream) -> None:
        while stream.step():
            pass
