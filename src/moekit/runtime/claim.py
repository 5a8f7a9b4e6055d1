"""A claim on experts of one layer, from the router's choice to the end of their computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moekit.runtime.expert_cache import ExpertCache


class Claim:
    """Experts of one layer that stay in memory until they are done with.

    `ready` are in memory already; `arrivals` yields the others. Use it in a `with`, or call
    `release` in the end. Where the experts do not fit together, call `done` for those computed:
    only then there is room for the next.
    """

    __slots__ = ("_arrived", "_cache", "_error", "_first", "_held", "_later", "_waiting", "ready")

    def __init__(self, cache: ExpertCache, first: int, held: list[int]) -> None:
        self._cache, self._first, self._held = cache, first, held
        self.ready: list[int] = held
        self._waiting = 0
        self._arrived: list[int] = []
        self._later: list[int] = []
        self._error: BaseException | None = None

    def arrivals(self) -> Iterator[list[int]]:
        """Yield the experts that were not ready, as they arrive, some at a time.

        Raises StoreError where one cannot be read, and UserError where the others do not fit
        beside those that are not `done`.
        """
        while arrived := self._cache._wait(self):
            yield arrived

    def done(self, experts: Sequence[int]) -> None:
        """These experts were computed: others may take their place."""
        self._cache._unpin(self, experts)

    def release(self) -> None:
        """Let go of all experts; what is still to be read for them is given up."""
        if self._held or self._waiting or self._later:
            self._cache._release(self)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
