"""Copies from RAM to the slots of a device, put in line so that none is too early and none is
waited for without need."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from moekit.runtime.claim import Claim
from moekit.runtime.device.device import Device, Mark


@dataclass(frozen=True)
class _Copy:
    """A copy in line, and the claim that keeps its source in RAM."""

    mark: Mark
    claim: Claim
    expert: int


class Copies:
    """The order of copies and computing for experts by number.

    A copy waits for the computing that last read any slot given up so far: computing has one order,
    so the latest of those is enough. A slot's earlier copy needs no waiting for, as copies too have
    one order.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._line: deque[_Copy] = deque()
        # Copies that computing has not been told to wait for.
        self._coming: dict[int, Mark] = {}
        self._last_use: dict[int, tuple[int, Mark]] = {}
        self._given_up: tuple[int, Mark] | None = None
        self._uses = 0

    def put(self, number: int, target: Tensor, source: Tensor, claim: Claim, expert: int) -> None:
        """Put a copy in line; `claim` keeps `source` in RAM and is told when it is read."""
        after = None if self._given_up is None else self._given_up[1]
        mark = self._device.copy(target, source, after)
        self._line.append(_Copy(mark, claim, expert))
        self._coming[number] = mark

    def arrive(self, number: int) -> bool:
        """Let computing wait for the copy of an expert; whether it has to."""
        mark = self._coming.pop(number, None)
        if mark is None or mark.done():
            return False
        self._device.follow(mark)
        return True

    def used(self, numbers: Iterable[int]) -> None:
        """All computing with these that there is so far has been launched."""
        self._uses += 1
        use = self._uses, self._device.mark()
        for number in numbers:
            self._last_use[number] = use

    def give_up(self, number: int) -> None:
        """The slot of an expert goes to another."""
        self._coming.pop(number, None)
        use = self._last_use.pop(number, None)
        if use is not None and (self._given_up is None or use[0] > self._given_up[0]):
            self._given_up = use

    def settle(self, *, wait: bool = False) -> None:
        """Let go of the RAM that copies have read: of all that are done, or of all in line."""
        while self._line and (wait or self._line[0].mark.done()):
            copy = self._line.popleft()
            if wait:
                copy.mark.wait()
            copy.claim.done([copy.expert])
