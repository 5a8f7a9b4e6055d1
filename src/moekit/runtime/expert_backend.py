"""The experts of a model at the seam, computed from the records that an expert cache holds.

Shapes: T tokens, K chosen, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.find import find_moe
from moekit.core.packed import PackedLayer
from moekit.core.view import MoEView
from moekit.ops import native
from moekit.runtime.claim import Claim
from moekit.runtime.lockstep import meet
from moekit.runtime.native_experts import NativeExperts, native_experts
from moekit.runtime.torch_experts import TorchExperts


class ExpertSource(Protocol):
    """Where records come from; `runtime.expert_cache.ExpertCache` is one."""

    def begin(
        self, layer: int, experts: ArrayLike, *, tokens: int = 1, counts: ArrayLike | None = None
    ) -> Claim:
        """Claim experts of a layer for a call of `tokens` tokens, `counts` of which use each."""

    def record(self, layer: int, expert: int) -> Tensor:
        """The bytes of all planes of an expert, one after the other."""


class ExpertBackend:
    """Computes the experts of `model` from `source` while it is entered.

    The native kernels do it where they can, else torch. Contributions are added up in the order of
    the choices whatever came first, so results do not depend on what was in memory. Sequences in
    lockstep share an expert that is fetched or decoded; the result of none depends on the others.
    """

    batches = True

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[PackedLayer], source: ExpertSource
    ) -> None:
        self._view = MoEView(model)
        self._source = source
        self._num_experts = [layer.num_experts for layer in self._view]
        library = native.library()
        self._pool = native.Pool(library, torch.get_num_threads()) if library else None
        self._experts = processor_experts(model, layers, self._pool)
        self._stack = ExitStack()

    def __enter__(self) -> ExpertBackend:
        for position in range(len(self._view)):
            backend = partial(self._run, position)
            self._stack.enter_context(self._view.use_backend(backend, layers=[position]))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        if self._pool is not None:
            self._pool.close()

    def _run(
        self, position: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        made: Tensor = meet(
            (self, position), partial(self._together, position), (hidden, ids, weights)
        )
        return made

    def _together(
        self, position: int, calls: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Tensor]:
        """The outputs of the layer for several sequences, each expert fetched once."""
        sizes = [len(hidden) for hidden, _, _ in calls]
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
        call = self._experts[position].start(hidden, ids, weights, sizes)
        used, counts = np.unique(ids.numpy(), return_counts=True)
        stored = (used >= 0) & (used < self._num_experts[position])
        with self._source.begin(
            position, used[stored], tokens=len(ids), counts=counts[stored]
        ) as claim:
            for experts in chain([claim.ready], claim.arrivals()):
                call.run({e: self._source.record(position, e) for e in experts})
                claim.done(experts)
        return list(call.result().split(sizes))


def processor_experts(
    model: PreTrainedModel, layers: Sequence[PackedLayer], pool: native.Pool | None
) -> list[NativeExperts | TorchExperts]:
    """What computes the experts of each MoE layer of `model` from their records."""
    banks: dict[Any, Tensor] = {}
    made = []
    for layer, site, packed in zip(MoEView(model), find_moe(model), layers, strict=True):
        fast = native_experts(layer, packed, model.dtype, pool) if pool is not None else None
        made.append(fast or TorchExperts(layer, site, packed, banks))
    return made
