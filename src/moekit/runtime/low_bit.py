"""A second expert cache that holds the first bit planes of experts, for those that fall back.

Lossy. Shapes: L MoE layers, E experts, T tokens, K chosen, n experts that a step needs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.packed import PackedLayer
from moekit.ops.native import ExpertFormat
from moekit.runtime.decoder_shape import DecoderShape
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.expert_formats import formats_of_layer
from moekit.runtime.schedule.fallback import PlaneFallback
from moekit.runtime.store import ExpertStore, Place


class FirstPlanes:
    """A store whose experts have their first `planes` planes only."""

    def __init__(self, store: ExpertStore, planes: int) -> None:
        self._store, self._planes = store, planes
        self.layers = store.layers

    def nbytes(self, layer: int, expert: int) -> int:
        return self._store.nbytes(layer, expert, self._planes)

    def fetch(self, buffer: Tensor, layer: int, expert: int) -> list[Tensor]:
        return self._store.fetch(buffer, layer, expert, self._planes)

    @property
    def placed(self) -> bool:
        return self._store.placed

    def place(self, layer: int, expert: int) -> Place:
        return self._store.place(layer, expert, self._planes)

    def arrived(self, buffer: Tensor, layer: int, expert: int, sums: Sequence[int]) -> None:
        self._store.arrived(buffer, layer, expert, sums, self._planes)


class LowBitExperts:
    """The experts of a packed model that a rule runs from few planes, and how the kernels read
    them.

    `cache` holds them, `formats` [L] are arrays of pointers to the format of each expert. Raises
    UserError for experts without so many planes, and where the memory holds none.
    """

    def __init__(
        self, store: ExpertStore, nbytes: int, rule: PlaneFallback, shape: DecoderShape
    ) -> None:
        for position, layer in enumerate(store.layers):
            fewest = min(layer.num_planes(e) for e in range(layer.num_experts))
            if fewest <= rule.planes:
                raise UserError(
                    f"plane-fallback: experts of MoE layer {position} have {fewest} planes, so "
                    f"{rule.planes} are not fewer than all; pack with a nested codec, as nested4"
                )
        self.rule = rule
        # Pointers alone do not keep what they point to.
        self._held = [_formats(layer, rule.planes, shape) for layer in store.layers]
        self.formats = [
            (POINTER(ExpertFormat) * len(made))(*map(ctypes.pointer, made)) for made in self._held
        ]
        few: Any = FirstPlanes(store, rule.planes)
        self.cache = ExpertCache(few, nbytes)

    def falls_back(
        self, needed: NDArray, ids: NDArray, weights: NDArray, whole: NDArray
    ) -> NDArray[np.bool_]:
        """Which of the experts `needed` [n] fall back, [n], where the router chose ids and weights
        [T, K] and `whole` [E] holds the addresses of the experts in memory."""
        largest = np.zeros(len(whole), dtype=np.float32)
        np.maximum.at(largest, ids.reshape(-1), weights.reshape(-1))
        return self.rule.falls_back(largest[needed], whole[needed] != 0)


def _formats(layer: PackedLayer, planes: int, shape: DecoderShape) -> list[ExpertFormat]:
    found = formats_of_layer(
        layer, shape.activation, alpha=shape.alpha, limit=shape.limit, planes=planes
    )
    if found is None:
        raise UserError("plane-fallback: the kernels do not read the first planes of this codec")
    return found
