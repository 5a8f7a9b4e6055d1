"""A claim on experts of one layer, some on a device, some for the processor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moekit.runtime.claim import Claim
from moekit.runtime.readers import Purpose

if TYPE_CHECKING:
    from moekit.runtime.device.cache import DeviceCache


@dataclass(frozen=True)
class Portion:
    """Experts that can be computed: those in the device's memory, for which computing there waits
    by itself, and those in RAM that are the processor's."""

    device: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)


class DeviceClaim:
    """Experts of one layer that stay where they are until they are done with.

    `host` are those that the processor computes. `portions` yields all of them, some at a time.
    Call `done` for those that the processor has computed, or whose computing on the device was
    launched: only then others can take their place, if the layer does not fit at one time.
    """

    def __init__(self, cache: DeviceCache, layer: int, purpose: Purpose, held: list[int]) -> None:
        self._cache, self.layer, self.purpose = cache, layer, purpose
        self.host: list[int] = []
        # The device's experts that stay, and those of them that are done.
        self.held, self.computed = set(held), set[int]()
        self.ready: list[int] = []
        # In RAM, to be copied; the copies of the others have begun.
        self.waiting: deque[int] = deque()
        self.copied: list[int] = []
        self.below: Claim | None = None
        # Claimed in RAM and not arrived there.
        self.absent = 0

    def portions(self) -> Iterator[Portion]:
        """Yield the experts as they can be computed.

        Raises StoreError where one cannot be read, and UserError where the others do not fit
        beside those that are not `done`.
        """
        return self._cache._portions(self)

    def done(self, experts: Sequence[int]) -> None:
        """These were computed, or will be by what was launched on the device."""
        self._cache._done(self, experts)

    def release(self) -> None:
        """Let go of all experts."""
        self._cache._release(self)

    def __enter__(self) -> DeviceClaim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
