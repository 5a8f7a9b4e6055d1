"""The experts of a model at the seam, computed where a device's cache has them.

Shapes: T tokens, K chosen, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.view import MoEView
from moekit.ops import native
from moekit.ops.triton.experts import GroupedExperts
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.device.claim import DeviceClaim
from moekit.runtime.device.costs import measure_costs
from moekit.runtime.device.formats import device_formats
from moekit.runtime.expert_backend import processor_experts
from moekit.runtime.schedule.split import SplitCosts


class DeviceBackend:
    """Computes the experts of `model` from `cache` while it is entered.

    On the device every contribution has a place of its own and they are added up in the order of
    the choices, so what was in memory does not change a bit. What a scheduler gives to the
    processor is computed there, from RAM, and added as one sum. Raises UserError for layers that
    the device's kernels cannot run. `splits` says whether there will be a scheduler.
    """

    def __init__(self, model: PreTrainedModel, cache: DeviceCache, *, splits: bool = False) -> None:
        self._view, self._cache, self._dtype = MoEView(model), cache, model.dtype
        self._num_experts = [layer.num_experts for layer in self._view]
        self._experts = [
            GroupedExperts(device_formats(layer, packed), cache.memory)
            for layer, packed in zip(self._view, cache.store.layers, strict=True)
        ]
        # For each layer, once all experts are on the device, where they are.
        self._placed: dict[int, list[Any]] = {}
        self._stack = ExitStack()
        self._processor: Sequence[Any] = []
        if splits:
            library = native.library()
            pool = native.Pool(library, torch.get_num_threads()) if library else None
            self._processor = processor_experts(model, cache.store.layers, pool)
            if pool is not None:
                self._stack.callback(pool.close)

    def __enter__(self) -> DeviceBackend:
        for position in range(len(self._view)):
            run = partial(self._run, position)
            self._stack.enter_context(self._view.use_backend(run, layers=[position]))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        # They hold on to the cache's memory.
        self._experts, self._placed = [], {}

    def costs(self) -> SplitCosts:
        """What experts cost on the device and on the processor; before the first call only."""
        return measure_costs(self._cache, self._experts[0], self._processor[0], self._dtype)

    def _run(
        self, position: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        if self._cache.complete:
            call = self._experts[position].start(hidden, ids, weights)
            call.run_placed(self._all_placed(position))
            return call.result()
        # The host must know who is chosen: the one point of a layer where it waits for the device.
        chosen = ids.cpu()
        used, counts = np.unique(chosen.numpy(), return_counts=True)
        stored = (used >= 0) & (used < self._num_experts[position])
        with self._cache.begin(
            position, used[stored], tokens=len(ids), counts=counts[stored]
        ) as claim:
            return self._compute(position, claim, hidden, ids, chosen, weights)

    def _compute(
        self,
        position: int,
        claim: DeviceClaim,
        hidden: Tensor,
        ids: Tensor,
        chosen: Tensor,
        weights: Tensor,
    ) -> Tensor:
        here = ids
        beside = None
        if claim.host:
            on_host = torch.isin(chosen, torch.tensor(claim.host))
            here = ids.masked_fill(on_host.to(ids.device), -1)
            beside = self._processor[position].start(
                hidden.cpu(), chosen.masked_fill(~on_host, -1), weights.cpu()
            )
        call = self._experts[position].start(hidden, here, weights)
        for portion in claim.portions():
            if portion.device:
                call.run({e: self._cache.offset(position, e) for e in portion.device})
                claim.done(portion.device)
            if portion.host and beside is not None:
                beside.run({e: self._cache.below.record(position, e) for e in portion.host})
                claim.done(portion.host)
        out = call.result()
        return out if beside is None else out + beside.result().to(out.device)

    def _all_placed(self, position: int) -> list[Any]:
        if position not in self._placed:
            offsets = {
                e: self._cache.offset(position, e) for e in range(self._num_experts[position])
            }
            self._placed[position] = self._experts[position].places(offsets)
        return self._placed[position]
