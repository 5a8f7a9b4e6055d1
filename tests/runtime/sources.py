"""Sources of records for tests, which hand out experts in a given order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moekit.runtime.pages import page_aligned
from moekit.runtime.store import ExpertStore


class StoreSource:
    """Reads every expert anew; the first `ready` are there at once, the others come by `portion`,
    last ones first."""

    def __init__(self, store: ExpertStore, ready: int = 10**6, portion: int = 1) -> None:
        self.store = store
        self.ready, self.portion = ready, portion
        self.held: dict[int, Tensor] = {}

    def begin(self, layer: int, experts: Any, **amounts: Any) -> StoreClaim:
        return StoreClaim(self, layer, experts.tolist())

    def record(self, layer: int, expert: int) -> Tensor:
        return self.held[expert]

    def read(self, layer: int, experts: list[int]) -> list[int]:
        for expert in experts:
            self.held[expert] = page_aligned(self.store.nbytes(layer, expert))
            self.store.read_into(self.held[expert], layer, expert)
        return experts


class StoreClaim:
    def __init__(self, source: StoreSource, layer: int, experts: list[int]) -> None:
        self.source, self.layer = source, layer
        self.ready = source.read(layer, experts[: source.ready])
        self.late = experts[source.ready :][::-1]

    def arrivals(self) -> Iterator[list[int]]:
        while self.late:
            experts, self.late = self.late[: self.source.portion], self.late[self.source.portion :]
            yield self.source.read(self.layer, experts)

    def done(self, experts: list[int]) -> None:
        for expert in experts:
            # What was given back may be overwritten at any time.
            self.source.held.pop(expert).fill_(0xFF)

    def __enter__(self) -> StoreClaim:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.source.held.clear()
