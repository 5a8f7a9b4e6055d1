"""`DeviceCache`: the experts that a device holds, above an expert cache in pinned RAM.

One thread computes and calls this. It never waits for the device: copies are put in line behind the
computing that still reads their slot, computing behind the copies it needs, and the RAM that a copy
reads stays claimed until the copy is seen to be done. It waits for RAM, which waits for the disk.

Lossless as long as no expert is given to the processor, which sums in another order. Shapes: L MoE
layers, E experts (of the layer that has most), T tokens, K chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moekit.core.cache_score import CacheScore
from moekit.core.errors import UserError
from moekit.runtime.cache_stats import CacheStats
from moekit.runtime.claim import Claim
from moekit.runtime.device.arena import Arenas
from moekit.runtime.device.claim import DeviceClaim, Portion
from moekit.runtime.device.copies import Copies
from moekit.runtime.device.device import Device
from moekit.runtime.expert_cache import ExpertCache, online_policy
from moekit.runtime.readers import Purpose
from moekit.runtime.residency import Residency, record_sizes
from moekit.runtime.schedule.split import ExpertLoad, Split
from moekit.runtime.slots import Slot

# Divides the experts that a layer uses between the device and the processor.
Scheduler = Callable[[Sequence[ExpertLoad]], Split]


@dataclass
class DeviceStats(CacheStats):
    """What a device's cache did; bytes are those copied from RAM.

    `late` are experts whose copy a hint had begun and that was not done (and are misses). `host`
    are those given to the processor.
    """

    host: int = 0


class DeviceCache:
    """Keeps experts in `nbytes` bytes of a device's memory; the others come from `below`.

    `policy` and `per_layer` are as for `ExpertCache`; `scheduler` may give experts to
    the processor, which computes them from RAM. `table` [L, E] is not 0 where the device holds an
    expert. Owns `below`. Raises UserError where the memory holds no expert.
    """

    def __init__(
        self,
        below: ExpertCache,
        device: Device,
        nbytes: int,
        *,
        policy: str | CacheScore = "auto",
        per_layer: bool = False,
        scheduler: Scheduler | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        self.below, self.device, self.nbytes = below, device, nbytes
        self.store, self.scheduler = below.store, scheduler
        self.stats = DeviceStats()
        sizes = record_sizes(self.store)
        self.score = policy if isinstance(policy, CacheScore) else online_policy(policy)
        self.memory = device.memory(nbytes)
        self._residency = Residency(
            sizes, nbytes, self.score, per_layer=per_layer, new_slots=Arenas(self.memory)
        )
        self._experts = sizes.shape[1]
        self.table: NDArray[np.uint64] = self._residency.table.reshape(sizes.shape)
        self._flat = self._residency.table
        self._gains: dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}
        self._guarding: set[int] = set()
        # By layer, what is hinted and is to be copied, likeliest last.
        self._hints: dict[int, list[int]] = {}
        self._then: Callable[[], object] | None = None
        self._asking = False
        self._unused: set[int] = set()
        self._copies = Copies(device)
        self._layer = 0
        self.on_close = on_close

    # -- what a layer asks for --

    def begin(
        self,
        layer: int,
        experts: ArrayLike,
        *,
        tokens: int = 1,
        counts: ArrayLike | None = None,
    ) -> DeviceClaim:
        """Claim experts of a layer, all different, as `ExpertCache.begin` does."""
        numbers = np.asarray(experts, dtype=np.intp).reshape(-1)
        held: list[int] = numbers.tolist()
        amounts = None if counts is None else np.asarray(counts, dtype=np.float64).reshape(-1)
        gains = self._gains.pop(layer, None)
        self._residency.use(layer, numbers + layer * self._experts, tokens, amounts, gains)
        self._layer = layer
        if layer in self._guarding:
            self._forget_hint(layer)
        self._copies.settle()
        claim = self._claim(layer, held, amounts, "demand")
        if self._then is not None:
            action, self._then = self._then, None
            # Copies for hints come after those of the claim, which `_portions` sees to.
            self._asking = True
            try:
                action()
            finally:
                self._asking = False
        return claim

    def then(self, action: Callable[[], object]) -> None:
        """Call `action` once within the next `begin`, as for `ExpertCache`."""
        self._then = action

    def scored(self, layer: int, experts: ArrayLike, scores: ArrayLike) -> None:
        """Router scores of the layer that begins next, as for `ExpertCache`."""
        gains = np.asarray(experts, dtype=np.intp), np.asarray(scores, dtype=np.float64)
        self._gains[layer] = gains

    def hint(self, layer: int, experts: Sequence[int]) -> None:
        """These experts, likeliest first, will probably be used by `layer`'s next step.

        Those on the device are evicted last; those in RAM are copied where nothing that is claimed
        or hinted must make room; the others are read into RAM.
        """
        if layer in self._guarding:
            self._forget_hint(layer)
        first = layer * self._experts
        known = [e for e in experts if self._residency.sizes[first + e]]
        self._residency.guarded[[first + e for e in known]] = True
        self._guarding.add(layer)
        missing = [e for e in known if not self.table[layer, e]]
        absent = [e for e in missing if not self.below.table[layer, e]]
        if absent:
            self.below.hint(layer, absent)
        self._hints[layer] = [e for e in missing if self.below.table[layer, e]][::-1]
        if not self._asking:
            self._copy_hints()

    def record(self, layer: int, expert: int) -> Tensor:
        """The bytes of a claimed expert in the device's memory; KeyError if it is not there."""
        return self._residency.slot(layer * self._experts + expert).view()

    def offset(self, layer: int, expert: int) -> int:
        """Where `record` begins in `memory`."""
        return self._residency.slot(layer * self._experts + expert).offset

    @property
    def complete(self) -> bool:
        """Whether every expert is on the device, and therefore stays."""
        return self._residency.count == np.count_nonzero(self._residency.sizes)

    def load_all(self, progress: Callable[[int], object] | None = None) -> None:
        """Copy every expert; `progress` gets the bytes so far. UserError where they do not fit."""
        needed = int(self._residency.sizes.sum())
        fitting = sum(pool.memory.limit for pool in self._residency.pools)
        if fitting < needed:
            raise UserError(f"all experts take {needed} bytes; the device's cache has {fitting}")
        self._fill(np.flatnonzero(self._residency.sizes), progress)

    def preload(self, ranks: ArrayLike) -> None:
        """Fill the cache with the experts of the highest `ranks` [L, E]."""
        chosen = self._residency.best(np.asarray(ranks, dtype=np.float64))
        self._fill(np.sort(np.asarray(chosen, dtype=np.intp)), None)

    def close(self) -> None:
        """Wait for the copies and give up all memory, that of `below` too. May be called twice."""
        self._copies.settle(wait=True)
        self._residency.clear()
        self.memory = self.device.memory(0)
        self.below.close()
        if self.on_close is not None:
            self.on_close()
            self.on_close = None

    def __enter__(self) -> DeviceCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- claims --

    def _claim(
        self,
        layer: int,
        held: list[int],
        counts: NDArray[np.float64] | None,
        purpose: Purpose,
    ) -> DeviceClaim:
        first = layer * self._experts
        if not all(0 <= e < self._experts and self._residency.sizes[first + e] for e in held):
            raise IndexError(f"layer {layer} has not all of the experts {held}")
        present = {e for e in held if self._flat[first + e]}
        host = self._for_host(held, counts, present) if purpose == "demand" else set()
        claim = DeviceClaim(self, layer, purpose, [e for e in held if e not in host])
        claim.host = [e for e in held if e in host]
        claim.ready = [e for e in held if e in present and e not in host]
        self._residency.pins[[first + e for e in claim.held]] += 1
        late = {first + e for e in claim.ready if self._copies.arrive(first + e)}
        if purpose == "demand":
            self._count_demand({first + e for e in claim.ready}, late, len(held), len(host))
        wanted = [e for e in held if e in host or e not in present]
        if wanted:
            claim.below = self.below.begin(layer, wanted)
            claim.absent = len(wanted) - len(claim.below.ready)
            self._in_ram(claim, claim.below.ready)
            self._start(claim)
        return claim

    def _for_host(
        self, held: list[int], counts: NDArray[np.float64] | None, present: set[int]
    ) -> set[int]:
        if self.scheduler is None:
            return set()
        amounts = [1] * len(held) if counts is None else counts.astype(int).tolist()
        loads = [ExpertLoad(e, count, e in present) for e, count in zip(held, amounts, strict=True)]
        return set(self.scheduler(loads).cpu)

    def _count_demand(self, used: set[int], late: set[int], asked: int, host: int) -> None:
        """Count experts `used` from the device, the copies of some of which came `late`."""
        self.stats.late += len(late)
        self.stats.hits += len(used) - len(late)
        self.stats.misses += asked - len(used) + len(late)
        self.stats.host += host
        self.stats.prefetch_hits += len(self._unused & used - late)
        self._unused -= used

    def _portions(self, claim: DeviceClaim) -> Iterator[Portion]:
        self._copy_hints(claim)
        if claim.ready:
            yield Portion(device=claim.ready)
        arrivals = iter(()) if claim.below is None else claim.below.arrivals()
        host = [] if claim.below is None else [e for e in claim.below.ready if e in claim.host]
        while True:
            self._start(claim)
            copied, claim.copied = claim.copied, []
            for expert in copied:
                self._copies.arrive(claim.layer * self._experts + expert)
            if copied or host:
                yield Portion(copied, host)
                host = []
            elif claim.absent:
                arrived = self._wait(arrivals)
                claim.absent -= len(arrived)
                self._in_ram(claim, arrived)
                host = [e for e in arrived if e in claim.host]
            elif claim.waiting:
                raise UserError(
                    f"{len(claim.waiting)} more experts do not fit into the device's cache of "
                    f"{self.nbytes} bytes beside those in use; say which are done"
                )
            else:
                self._copy_hints(claim)
                return

    def _wait(self, arrivals: Iterator[list[int]]) -> list[int]:
        """The next experts that have come to RAM; what finished copies read is given back first,
        for there may be no other room."""
        began = time.perf_counter()
        self._copies.settle(wait=True)
        arrived = next(arrivals)
        self.stats.wait_seconds += time.perf_counter() - began
        return arrived

    def _in_ram(self, claim: DeviceClaim, experts: Sequence[int]) -> None:
        claim.waiting.extend(e for e in experts if e not in claim.host)

    def _start(self, claim: DeviceClaim) -> None:
        """Put copies in line for what a claim waits for, as far as there is room."""
        victims = self._residency.victims(claim.layer)
        while claim.waiting:
            number = claim.layer * self._experts + claim.waiting[0]
            slot = self._room(number, victims)
            if slot is None and claim.computed:
                # Whom the policy would keep leaves only where the layer does not fit at one time.
                self._unpin(claim)
                victims = self._residency.victims(claim.layer)
                continue
            if slot is None:
                return
            expert = claim.waiting.popleft()
            assert claim.below is not None
            self._copy(number, slot, claim.below, claim.purpose)
            claim.copied.append(expert)

    def _done(self, claim: DeviceClaim, experts: Sequence[int]) -> None:
        host = [e for e in experts if e in claim.host]
        if host and claim.below is not None:
            claim.below.done(host)
        computed = claim.held.intersection(experts) - claim.computed
        if not computed:
            return
        self._copies.used([claim.layer * self._experts + e for e in computed])
        claim.computed |= computed

    def _unpin(self, claim: DeviceClaim) -> None:
        first = claim.layer * self._experts
        self._residency.pins[[first + e for e in claim.computed]] -= 1
        claim.held -= claim.computed
        claim.computed = set()

    def _release(self, claim: DeviceClaim) -> None:
        self._done(claim, [*claim.held, *claim.host])
        self._unpin(claim)
        if claim.below is not None and (claim.absent or claim.waiting):
            # Given up half way. What was copied is let go of as every copy is; the rest here, and
            # nothing may still read it.
            self._copies.settle(wait=True)
            claim.below.release()
        claim.below = None

    # -- copies --

    def _room(self, number: int, victims: Iterator[int]) -> Slot | None:
        memory = self._residency.pool(number // self._experts).memory
        while (slot := memory.take(int(self._residency.sizes[number]))) is None:
            victim = next(victims, None)
            if victim is None:
                return None
            self._evict(victim)
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._residency.held)
        return slot

    def _evict(self, victim: int) -> None:
        self._residency.evict(victim)
        self.stats.evictions += 1
        if victim in self._unused:
            self._unused.remove(victim)
            self.stats.wasted_bytes += int(self._residency.sizes[victim])
        self._copies.give_up(victim)

    def _copy(self, number: int, slot: Slot, claim: Claim, purpose: Purpose) -> None:
        layer, expert = divmod(number, self._experts)
        self._copies.put(number, slot.view(), self.below.record(layer, expert), claim, expert)
        self._residency.place(number, slot)
        if purpose == "prefetch":
            self._unused.add(number)
            self.stats.prefetch_reads += 1
            self.stats.prefetch_bytes += slot.size
        elif purpose == "demand":
            self.stats.demand_reads += 1
            self.stats.demand_bytes += slot.size
        else:
            self.stats.preload_reads += 1
            self.stats.preload_bytes += slot.size

    # -- hints --

    def _copy_hints(self, claim: DeviceClaim | None = None) -> None:
        """Put copies in line for what is hinted, as far as there is room that nobody wants; what a
        claim needs comes first."""
        if claim is not None and (claim.absent or claim.waiting):
            return
        for layer in sorted(self._hints, key=lambda layer: (layer - self._layer) % len(self.table)):
            missing = self._hints.pop(layer)
            source = self.below.hold(layer, missing)
            victims = self._residency.victims(layer, self._layer, guarded=False)
            while missing:
                expert = missing.pop()
                number = layer * self._experts + expert
                if expert not in source.ready:
                    continue
                slot = None if self._flat[number] else self._room(number, victims)
                if slot is None:
                    source.done([expert])
                else:
                    self._copy(number, slot, source, "prefetch")

    def _forget_hint(self, layer: int) -> None:
        self._guarding.remove(layer)
        self._hints.pop(layer, None)
        self._residency.guarded[layer * self._experts : (layer + 1) * self._experts] = False

    def _fill(self, numbers: NDArray[np.integer], progress: Callable[[int], object] | None) -> None:
        copied = 0
        for layer in range(len(self.table)):
            own = numbers[numbers // self._experts == layer] - layer * self._experts
            with self._claim(layer, own.tolist(), None, "preload") as claim:
                for portion in claim.portions():
                    copied += sum(self.store.nbytes(layer, e) for e in portion.device)
                    claim.done(portion.device)
                    if progress is not None:
                        progress(copied)
        self._copies.settle(wait=True)
        read = self.below.stats
        self.below.stats = CacheStats(
            preload_reads=read.demand_reads + read.preload_reads,
            preload_bytes=read.total_bytes,
            peak_bytes=read.peak_bytes,
        )
