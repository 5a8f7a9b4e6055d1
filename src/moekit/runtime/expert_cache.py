"""`ExpertCache`: the experts of a store in a given number of bytes, read when they are needed.

Lossless: which experts are in memory changes when a layer is ready, never what it computes. Shapes:
L MoE layers, E experts (of the layer that has most), T tokens, K chosen, G experts that gain.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moekit.core.cache_score import CacheScore, policy
from moekit.core.errors import UserError
from moekit.runtime.cache_stats import CacheStats
from moekit.runtime.claim import Claim
from moekit.runtime.native_readers import open_readers
from moekit.runtime.readers import Load, Purpose
from moekit.runtime.residency import NewSlots, Residency, record_sizes
from moekit.runtime.schedule.read_order import hottest_first
from moekit.runtime.slots import Slot, SlotMemory
from moekit.runtime.store import ExpertStore

# Threads that read where there are no kernels: two keep a disk busy while one of them checks.
READERS = 2


class ExpertCache:
    """Keeps experts of `store` in at most `nbytes` bytes, reads in flight included.

    `policy` decides who stays, by name or as a score; one that ranks by profile needs `profile`
    [L, E]. Slots are shared by all layers unless `per_layer`. `table` [L, E] holds the address of
    the record of each expert (all its planes, one after the other) or 0; an address is good while a
    claim holds the expert. Native threads read in the background, or `readers` others where there
    are no kernels, into what `new_slots` makes.

    One thread computes: `begin`, `scored`, `then`, `hint` and claims are for it alone. Raises
    UserError where the memory holds no expert.
    """

    def __init__(
        self,
        store: ExpertStore,
        nbytes: int,
        *,
        policy: str | CacheScore = "auto",
        per_layer: bool = False,
        readers: int = READERS,
        profile: ArrayLike | None = None,
        new_slots: NewSlots = SlotMemory,
    ) -> None:
        self.store, self.nbytes, self.stats = store, nbytes, CacheStats()
        sizes = record_sizes(store)
        ranks = None if profile is None else np.asarray(profile, dtype=np.float64)
        if ranks is not None and ranks.shape != sizes.shape:
            raise UserError(f"a profile of shape {ranks.shape} does not fit experts {sizes.shape}")
        self.score = policy if isinstance(policy, CacheScore) else online_policy(policy)
        self._residency = Residency(
            sizes, nbytes, self.score, per_layer=per_layer, profile=ranks, new_slots=new_slots
        )
        self._experts = sizes.shape[1]
        self.table: NDArray[np.uint64] = self._residency.table.reshape(sizes.shape)
        self._flat = self._residency.table
        self._pins = self._residency.pins
        self._loads: dict[int, Load] = {}
        # By layer, what is hinted and not read yet, likeliest last.
        self._hints: dict[int, list[int]] = {}
        self._then: Callable[[], object] | None = None
        self._gains: dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}
        self._guarding: set[int] = set()
        self._unused: set[int] = set()
        self._layer = 0
        self._lock = threading.Lock()
        self._closed = False
        self._readers = open_readers(
            store,
            self._experts,
            readers,
            self._lock,
            finished=self._finished,
            spare=self._next_prefetch,
        )

    def begin(
        self,
        layer: int,
        experts: ArrayLike,
        *,
        tokens: int = 1,
        counts: ArrayLike | None = None,
    ) -> Claim:
        """Claim experts of a layer, all different: those in memory stay, the others are read.

        `tokens` is how many tokens go through the layer, `counts` how many of them use each
        expert (1 by default): the most used are read first.
        """
        numbers = np.asarray(experts, dtype=np.intp).reshape(-1)
        held: list[int] = numbers.tolist()
        first = layer * self._experts
        numbers = numbers + first
        amounts = None if counts is None else np.asarray(counts, dtype=np.float64)
        with self._lock:
            self._check_open()
            self._readers.poll()
            gains = self._gains.pop(layer, None)
            self._residency.use(layer, numbers, tokens, amounts, gains)
            if amounts is not None:
                order = hottest_first(amounts)
                numbers, held = numbers[order], [held[i] for i in order.tolist()]
            self._layer = layer
            if layer in self._guarding:
                self._forget_hint(layer)
            claim = self._claim(layer, numbers, held, "demand")
        if self._then is not None:
            action, self._then = self._then, None
            action()
        return claim

    def then(self, action: Callable[[], object]) -> None:
        """Call `action` once, within the next `begin`, as soon as what that needs is being read:
        hints given there come after it, and working them out takes time in which the disk works.

        It takes the place of an action before that was not called.
        """
        self._then = action

    def scored(self, layer: int, experts: ArrayLike, scores: ArrayLike) -> None:
        """The router's scores [G] of experts [G] of the layer that begins next: what a policy of
        recent scores learns from in place of uses."""
        gains = np.asarray(experts, dtype=np.intp), np.asarray(scores, dtype=np.float64)
        self._gains[layer] = gains

    def hold(self, layer: int, experts: Sequence[int]) -> Claim:
        """Claim those of the experts that are in memory, `ready`, without counting it as a use."""
        with self._lock:
            self._check_open()
            self._readers.poll()
            held = [e for e in experts if self.table[layer, e]]
            numbers = np.asarray(held, dtype=np.intp) + layer * self._experts
            return self._claim(layer, numbers, held, "preload")

    def hint(self, layer: int, experts: Sequence[int]) -> None:
        """These experts, likeliest first, will probably be used by `layer`'s next step.

        Those in memory are evicted last, the others are read when no demand waits; nothing that is
        claimed or hinted makes room for them. Takes the place of the layer's hint before.
        """
        first = layer * self._experts
        with self._lock:
            self._check_open()
            self._readers.poll()
            if layer in self._guarding:
                self._forget_hint(layer)
            sizes = self._residency.sizes
            numbers = [n for expert in experts if sizes[n := expert + first]]
            self._residency.guarded[numbers] = True
            self._guarding.add(layer)
            missing = [n for n in numbers if not self._flat[n] and n not in self._loads]
            if missing:
                self._hints[layer] = missing[::-1]
                self._readers.wake()

    def record(self, layer: int, expert: int) -> Tensor:
        """The bytes of all planes of a claimed expert; KeyError if it is not in memory."""
        return self._residency.slot(layer * self._experts + expert).view()

    @property
    def complete(self) -> bool:
        """Whether every expert is in memory, and therefore stays."""
        return self._residency.count == int(np.count_nonzero(self._residency.sizes))

    def load_all(self, progress: Callable[[int], object] | None = None) -> None:
        """Read every expert, all checksums verified; `progress` gets the bytes read so far.

        Raises UserError where they do not fit, StoreError where one cannot be read.
        """
        needed = int(self._residency.sizes.sum())
        fitting = sum(pool.memory.limit for pool in self._residency.pools)
        if fitting < needed:
            raise UserError(f"all experts take {needed} bytes; the expert cache has {fitting}")
        self._fill(range(len(self._residency.sizes)), progress)

    def preload(self, ranks: ArrayLike, progress: Callable[[int], object] | None = None) -> None:
        """Fill the cache with the experts of the highest `ranks` [L, E], uses in the past say."""
        chosen = self._residency.best(np.asarray(ranks, dtype=np.float64))
        self._fill(sorted(chosen), progress)

    def close(self) -> None:
        """End the readers and give up all memory; a read that has begun is waited for."""
        with self._lock:
            self._closed = True
        self._readers.close()
        self._residency.clear()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the expert cache is closed")

    def _fill(self, numbers: Sequence[int], progress: Callable[[int], object] | None) -> None:
        sizes, experts, read = self._residency.sizes, self._experts, 0
        for layer in range(len(self.table)):
            own = np.arange(layer * experts, (layer + 1) * experts)
            own = own[np.isin(own, numbers) & (sizes[own] > 0)]
            with self._lock:
                self._check_open()
                claim = self._claim(layer, own, (own - layer * experts).tolist(), "preload")
            with claim:
                for arrived in (claim.ready, *claim.arrivals()):
                    read += int(sizes[[layer * experts + e for e in arrived]].sum())
                    if progress is not None:
                        progress(read)

    # The lock is held in everything below, but for `_wait`, `_unpin` and `_release`.

    def _claim(
        self, layer: int, numbers: NDArray[np.intp], held: list[int], purpose: Purpose
    ) -> Claim:
        claim = Claim(self, layer * self._experts, held)
        self._pins[numbers] += 1
        present = self._flat[numbers] != 0
        hits = int(np.count_nonzero(present))
        if purpose == "demand":
            self.stats.hits += hits
            self.stats.misses += len(held) - hits
            if self._unused:
                used = self._unused.intersection(numbers[present].tolist())
                self.stats.prefetch_hits += len(used)
                self._unused -= used
        if hits < len(held):
            claim.ready = [e for e, there in zip(held, present.tolist(), strict=True) if there]
            for number in numbers[~present].tolist():
                self._ask(claim, number, purpose)
            self._start(claim, purpose)
        return claim

    def _ask(self, claim: Claim, number: int, purpose: Purpose) -> None:
        load = self._loads.get(number)
        if load is None and self._flat[number]:
            claim._arrived.append(number - claim._first)
            return
        if load is None:
            claim._later.append(number)
            return
        if load.purpose == "prefetch" and not load.wanted:
            load.wanted = True
            self._readers.hurry(load)
            self.stats.late += purpose == "demand"
        load.claims.append(claim)
        claim._waiting += 1

    def _start(self, claim: Claim, purpose: Purpose = "demand") -> None:
        """Start reading what a claim still needs, as far as there is room."""
        if not claim._later:
            return
        layer = claim._later[0] // self._experts
        victims = self._residency.victims(layer)
        while claim._later:
            number = claim._later[0]
            if self._flat[number] or number in self._loads:
                # A hint was quicker.
                del claim._later[0]
                self._ask(claim, number, purpose)
                continue
            slot = self._room(number, victims)
            if slot is None:
                return
            del claim._later[0]
            load = self._loads[number] = Load(number, slot, purpose, [claim])
            claim._waiting += 1
            self._readers.demand(load)

    def _room(self, number: int, victims: Iterator[int]) -> Slot | None:
        memory = self._residency.pool(number // self._experts).memory
        size = int(self._residency.sizes[number])
        if not size:
            raise IndexError(f"layer {number // self._experts} has no such expert: {number}")
        while (slot := memory.take(size)) is None:
            victim = next(victims, None)
            if victim is None:
                return None
            self._residency.evict(victim)
            self.stats.evictions += 1
            if victim in self._unused:
                self._unused.remove(victim)
                self.stats.wasted_bytes += int(self._residency.sizes[victim])
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._residency.held)
        return slot

    def _next_prefetch(self, evicts: bool) -> Load | None:
        for layer in sorted(self._hints, key=lambda layer: (layer - self._layer) % len(self.table)):
            missing = self._hints[layer]
            while missing and (self._flat[missing[-1]] or missing[-1] in self._loads):
                missing.pop()
            victims = self._residency.victims(layer, self._layer, guarded=False)
            slot = self._room(missing[-1], victims if evicts else iter(())) if missing else None
            number = missing.pop() if slot is not None else -1
            if not missing:
                del self._hints[layer]
            if slot is not None:
                load = self._loads[number] = Load(number, slot, "prefetch")
                return load
        return None

    def _forget_hint(self, layer: int) -> None:
        self._guarding.remove(layer)
        self._hints.pop(layer, None)
        self._residency.guarded[layer * self._experts : (layer + 1) * self._experts] = False

    def _finished(self, load: Load, error: BaseException | None) -> None:
        del self._loads[load.number]
        if error is not None:
            self._residency.pool(load.number // self._experts).memory.give(load.slot)
        else:
            self._residency.place(load.number, load.slot)
            self._count(load)
        for claim in load.claims:
            claim._waiting -= 1
            if error is None:
                claim._arrived.append(load.number - claim._first)
            else:
                claim._error = error

    def _count(self, load: Load) -> None:
        stats = self.stats
        if load.purpose == "prefetch":
            stats.prefetch_reads += 1
            stats.prefetch_bytes += load.slot.size
            if not load.wanted:
                self._unused.add(load.number)
        elif load.purpose == "demand":
            stats.demand_reads += 1
            stats.demand_bytes += load.slot.size
        else:
            stats.preload_reads += 1
            stats.preload_bytes += load.slot.size

    def _wait(self, claim: Claim) -> list[int]:
        """The next experts of a claim that are there; none when it has all."""
        began = time.perf_counter()
        with self._lock:
            while not claim._arrived:
                self._check_open()
                if claim._error is not None:
                    error, claim._error = claim._error, None
                    raise error
                self._start(claim)
                if claim._arrived or not (claim._waiting or claim._later):
                    break
                if not self._loads:
                    raise UserError(
                        f"{len(claim._later)} more experts do not fit into the expert cache of "
                        f"{self.nbytes} bytes beside those in use; say which are done"
                    )
                # For its own reads, or for a prefetch that can make room once it is done.
                self._readers.wait()
            arrived, claim._arrived = claim._arrived, []
            self.stats.wait_seconds += time.perf_counter() - began
            return arrived

    def _unpin(self, claim: Claim, experts: Sequence[int]) -> None:
        with self._lock:
            left = set(experts)
            self._pins[[claim._first + e for e in left]] -= 1
            claim._held = [e for e in claim._held if e not in left]
            self._start(claim)

    def _release(self, claim: Claim) -> None:
        with self._lock:
            if claim._held:
                self._pins[[claim._first + e for e in claim._held]] -= 1
            claim._held, claim._later = [], []
            if self._hints:
                self._readers.wake()
            for load in list(self._loads.values()) if claim._waiting else ():
                if claim in load.claims:
                    load.claims.remove(claim)
                    if not load.claims and self._readers.cancel(load):
                        del self._loads[load.number]
                        memory = self._residency.pool(load.number // self._experts).memory
                        memory.give(load.slot)
            claim._waiting = 0


def online_policy(name: str) -> CacheScore:
    """The score of a policy that an engine can follow; UserError for one that knows the future."""
    score = policy(name)
    if score.future != "none":
        raise UserError(f"policy {name} knows the future: it is for simulation only")
    return score
