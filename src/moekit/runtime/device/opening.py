"""Opening a packed model on a device: the resident part and as many experts as fit in its memory,
the others in pinned RAM, and on disk what does not fit there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.memory import format_bytes
from moekit.core.registry import registry
from moekit.core.view import MoEView
from moekit.ops.codecs import Codec, make_codec
from moekit.runtime.budget import Budget, Needs, plan_budget
from moekit.runtime.device.arena import Arenas
from moekit.runtime.device.backend import DeviceBackend
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.device.costs import link_speed
from moekit.runtime.device.device import Device
from moekit.runtime.device.linear import encode_linears
from moekit.runtime.disk_speed import disk_speed
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.pages import page_aligned
from moekit.runtime.predict.files import make_predictor
from moekit.runtime.predict.gates import Gate, gates_of
from moekit.runtime.prefetch import Prefetching, new_prefetcher, pays
from moekit.runtime.resident import move, resident_model
from moekit.runtime.schedule.split import SplitCosts

if TYPE_CHECKING:
    from moekit.runtime.open_packed import _Opening

# Memory of a GPU beside what is counted: CUDA's context and loaded kernels, and of it what torch
# allocates for workspaces of products and by rounding up.
CONTEXT_BYTES, WORKSPACE_BYTES = 640 * 2**20, 128 * 2**20
AUTO, PREDICTOR = "auto", "next-gate"
# Those that divide a layer between the device and the processor; the first leaves it all there.
SCHEDULERS = ("on-demand", "hybrimoe", "fiddler", "static-split")
# Copies of the largest resident tensor that reading it takes in RAM; bytes for each weight of an
# expert that the processor decodes; experts in RAM, as multiples of a token's, on their way to a
# device that holds all.
_READING, _DECODING, PASSING = 3, 24, 2


@dataclass(frozen=True)
class OnDevice:
    """A model opened on a device: what runs it, and where memory goes in RAM and there."""

    runner: GraphRunner
    cache: DeviceCache
    budget: Budget
    gpu_budget: Budget


class DeviceOpening:
    """One model on its way to a device."""

    def __init__(self, opening: _Opening, device: Device) -> None:
        self.opening, self._device = opening, device
        self._store, self._request = opening.store, opening.request
        asked = self._request.scheduler
        if asked not in SCHEDULERS:
            raise UserError(f"scheduler {asked} is none of {', '.join(SCHEDULERS)}")
        if self._request.runner == "native":
            raise UserError("the native runner is for the processor: leave it out with a device")
        score = self._request.policy
        if (policy(score) if isinstance(score, str) else score).profile:
            raise UserError(f"policy {score} is for the processor: take another with a device")
        self._splits = asked != SCHEDULERS[0]

    def open(self, stack: ExitStack) -> OnDevice:
        """Load the model; UserError with all numbers where it does not fit."""
        opening, device = self.opening, self._device
        codec = self._codec()
        if codec is None:
            info = [tensor.nbytes for tensor in self._store.resident_info().values()]
            self._gpu_budget(sum(info), 0, 0)
            loading = _READING * max(info)
            model = resident_model(self._store, opening.config, opening.dtype, device.torch_device)
        else:
            model = resident_model(self._store, opening.config, opening.dtype)
            loading = _held_bytes(model)
            encode_linears(model, codec, device.torch_device)
            move(model, device.torch_device)
        runner = GraphRunner(model)
        stack.callback(runner.close)
        kv_cache = opening.streams * runner.cache_size.nbytes(opening.context)
        scratch = runner.scratch_bytes(opening.context, opening.streams, 0) + self._middle(runner)
        above = self._gpu_budget(_held_bytes(model), kv_cache, scratch)
        device.limit(above.limit - CONTEXT_BYTES + WORKSPACE_BYTES)
        below = self._budget(loading, above)
        cache = stack.enter_context(self._cache(above, below))
        backend = DeviceBackend(model, cache, splits=self._splits)
        runner.attach(backend)
        if self._splits:
            self._schedule(cache, backend.costs())
        if above.complete:
            cache.load_all()
        view = MoEView(model)
        found = None
        # Some routers cannot be asked.
        with suppress(UserError):
            found = _gates(view, device.torch_device)
        if found is not None:
            prefetching = self._prefetching(cache, above, below, found)
            if prefetching is not None:
                runner.attach(view.observe(prefetching.seam))
        return OnDevice(runner, cache, below, above)

    def _codec(self) -> Codec | None:
        """What the linear layers are encoded with: as asked for, else as they are stored."""
        stored = self._store.header.encoded
        if self._request.resident_codec is not None:
            return make_codec(self._request.resident_codec)
        return None if stored is None else stored.codec.make()

    def _gpu_budget(self, resident: int, kv_cache: int, scratch: int) -> Budget:
        opening = self.opening
        needs = Needs(CONTEXT_BYTES, resident, kv_cache, scratch, opening.streams, opening.context)
        free, total = self._device.free_bytes()
        limit = self._request.gpu_memory
        if limit is not None and limit > total:
            raise UserError(
                f"gpu_memory {format_bytes(limit)} is more than the GPU has: {format_bytes(total)}"
            )
        return plan_budget(limit, needs, opening.sizes, opening.spec.top_k, free, of="gpu_memory")

    def _middle(self, runner: GraphRunner) -> int:
        """Bytes between the two halves of the experts of one layer, for all pairs at once."""
        opening = self.opening
        rows = min(runner.chunk, opening.context) if runner.can_chunk else opening.context
        widest = max(layer.expert_width for layer in opening.spec.per_layer)
        return 4 * rows * opening.spec.top_k * widest

    def _budget(self, scratch: int, above: Budget) -> Budget:
        """Of RAM: what does not fit on the device, or a few experts on their way there, beside the
        bytes that loading takes."""
        opening = self.opening
        if self._splits:
            scratch += _DECODING * max(x.params_per_expert for x in opening.spec.per_layer)
        needs = Needs(opening.program, 0, 0, scratch, opening.streams, opening.context)
        wanted = self._request.expert_cache
        if above.complete:
            passing = PASSING * opening.spec.top_k * int(opening.sizes.max())
            wanted = min(passing, wanted or passing)
        return plan_budget(
            self._request.limit,
            needs,
            opening.sizes,
            opening.spec.top_k,
            opening.available,
            wanted,
        )

    def _cache(self, above: Budget, below: Budget) -> DeviceCache:
        device, score = self._device, self._request.policy
        memory = page_aligned(below.expert_cache)
        device.pin(memory)
        with ExitStack() as held:
            held.callback(device.unpin, memory)
            held.callback(device.limit, device.free_bytes()[1])
            in_ram = held.enter_context(
                ExpertCache(self._store, below.expert_cache, policy=score, new_slots=Arenas(memory))
            )
            made = DeviceCache(
                in_ram,
                device,
                above.expert_cache,
                policy=score,
                per_layer=self._request.slots_per_layer,
            )
            made.on_close = held.pop_all().close
        return made

    def _schedule(self, cache: DeviceCache, costs: SplitCosts) -> None:
        split = registry.find(self._request.scheduler, kind="scheduler").load()
        cache.scheduler = partial(split, costs=costs)
        self.opening.notes.append(
            f"{self._request.scheduler}: an expert takes {1e3 * costs.gpu_expert:.2f} ms on the "
            f"GPU and {1e3 * costs.transfer:.2f} ms to get there, a token of it "
            f"{1e3 * costs.cpu_token:.2f} ms on the processor"
        )

    def _prefetching(
        self, cache: DeviceCache, above: Budget, below: Budget, gates: list[Gate]
    ) -> Prefetching | None:
        asked = self._request.predictor
        if above.complete or not self._request.prefetch:
            return None
        bandwidth = link_speed(cache) if below.complete else disk_speed(self._store).bandwidth
        if asked == AUTO:
            if not pays(self.opening.sizes, bandwidth):
                self.opening.notes.append(
                    "nothing is copied ahead: predicting takes as long as a copy"
                )
                return None
            asked = PREDICTOR
        predictor = make_predictor(asked, gates=gates) if isinstance(asked, str) else asked
        spec = self.opening.spec
        made = new_prefetcher(predictor, cache, spec.num_experts, spec.top_k, bandwidth)
        return Prefetching(cache, made)


def _held_bytes(model: PreTrainedModel) -> int:
    held = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    return sum({t.data_ptr(): t.nbytes for t in held}.values())


def _gates(view: MoEView, device: torch.device) -> list[Gate]:
    """The gates of a model on a device, asked and answering in the processor's memory."""

    def values(gate: Gate) -> Callable[[Tensor], Tensor]:
        return lambda hidden: gate.values(hidden.to(device)).cpu()

    return [
        replace(
            gate,
            values=values(gate),
            gain=None if gate.gain is None else gate.gain.cpu(),
            offset=None if gate.offset is None else gate.offset.cpu(),
        )
        for gate in gates_of(view)
    ]
