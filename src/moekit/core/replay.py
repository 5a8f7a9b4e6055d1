"""Replays routing through an expert cache and counts demand hits; nothing is loaded or computed.

The rules are those of local routing consistency (arXiv 2505.16056): the K experts of a token are
judged together against the cache as the previous token left it, and then inserted one after
another, each evicting the lowest score among all that are inside.

Shapes: T tokens, N streams (independent caches), K chosen, E experts, C capacities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.core.cache_score import CLOCK, CacheScore, ScoreState
from moekit.core.errors import UserError
from moekit.core.trace import RoutingTrace

# Times of last use that are compared at once: bounds memory at a few times 4 bytes each.
BLOCK = 2**21


@dataclass(frozen=True)
class Replay:
    """Demand hits by capacity and stream, [C, N], of the accesses [N] of every stream."""

    capacities: tuple[int, ...]
    hits: NDArray[np.int64]
    accesses: NDArray[np.int64]

    @property
    def misses(self) -> NDArray[np.int64]:
        """Demand misses [C, N]."""
        return self.accesses - self.hits

    @property
    def hit_rate(self) -> NDArray[np.float64]:
        """Hits over accesses, all streams together, [C]; 0 without accesses."""
        return self.hits.sum(1) / max(self.accesses.sum(), 1)


def replay(
    ids: NDArray[np.integer],
    num_experts: int,
    score: CacheScore,
    capacities: Sequence[int],
    *,
    layers: int = 1,
    free_start: bool = False,
    hold: bool = False,
    profile: NDArray[np.floating] | None = None,
    gains: tuple[NDArray[np.integer], NDArray[np.floating]] | None = None,
) -> Replay:
    """Replay ids [T, N, K] through N caches of each of the capacities, in slots of one expert.

    An id of -1 is no access; the others of a token differ. `layers` is the number of layers that
    share a stream, whose tokens then are the layers of a token in turn (`accesses`). `free_start`
    counts the first use of an expert as a hit while the cache still has free slots, as the paper
    does. `hold` keeps the experts of a token until all of them are inside, as an engine that
    computes them together must; it needs K slots. Without it an expert passes through a hot set
    that it is not in and takes no slot. `profile` [N, E] ranks experts for a score that asks for
    one; `gains` are experts [T, N, G] and their router scores [T, N, G] for one that asks for them.
    Raises UserError for a capacity below 1, or below K with `hold`.
    """
    ids = _checked(ids, num_experts, capacities, hold)
    steps, streams, _ = ids.shape
    cache = _Cache(streams, num_experts, capacities)
    ranks = None if profile is None else np.asarray(profile, dtype=np.float64)
    scores = _scores(score, ids, num_experts, ranks, layers)
    if score.profile and ranks is not None:
        cache.load_best(ranks)
    seen = np.zeros((streams, num_experts + 1), dtype=bool)
    rows = np.arange(streams)[:, None]
    hits = np.zeros((len(capacities), streams), dtype=np.int64)
    for step in range(steps):
        now = ids[step]
        inside = cache.inside(now)
        if free_start:
            new = ~seen[rows, now] & (now < num_experts)
            # The first of two new experts may take the last free slot.
            inside |= new & (cache.room[:, :, None] > np.cumsum(new, axis=1) - new)
            seen[rows, now] = True
        hits += inside.sum(-1)
        gained = None if gains is None else (gains[0][step], gains[1][step])
        served = scores.use(step // layers, now, gains=gained)
        present = scores.present(step % layers)
        cache.insert(now, served, present, hold=hold, only_better=score.profile and not hold)
        scores.keys[rows, now] = served
    return Replay(tuple(capacities), hits, (ids < num_experts).sum((0, 2)))


def accesses(
    trace: RoutingTrace, start: int = 0, stop: int | None = None, *, shared: bool = False
) -> tuple[NDArray[np.int32], int]:
    """The accesses [T, N, K] of the tokens [start, stop) of a trace, and the number of experts.

    Every layer is a stream; layers of fewer experts or choices are filled up with -1. `shared` puts
    all layers into one pool instead: one stream whose tokens are the layers of the tokens in turn,
    the experts of layer l counting from l times the largest number of experts.
    """
    num_experts = max(layer.num_experts for layer in trace.layers)
    width = max(layer.top_k for layer in trace.layers)
    columns = []
    for position, layer in enumerate(trace.layers):
        chosen = trace.layer(position, start, stop).topk_ids.numpy()
        # Choices beyond the experts have no weights: nothing is read for them.
        chosen = np.where(chosen < layer.num_experts, chosen, -1).astype(np.int32)
        missing = ((0, 0), (0, width - chosen.shape[1]))
        columns.append(np.pad(chosen, missing, constant_values=-1))
    ids = np.stack(columns, axis=1)
    if not shared:
        return ids, num_experts
    offsets = (np.arange(len(columns)) * num_experts)[None, :, None]
    pooled = np.where(ids < 0, -1, ids + offsets)
    return pooled.reshape(-1, 1, width), num_experts * len(columns)


def stack_distances(ids: NDArray[np.integer], num_experts: int) -> NDArray[np.int32]:
    """How many experts were used since the last use of each, [T, N, K]; E at a first use.

    An LRU cache of C slots hits exactly the accesses of distance below C, so one pass answers for
    every capacity. Unused places (id -1) get -1.
    """
    ids = _checked(ids, num_experts, (1,), False)
    steps, streams, width = ids.shape
    distances = np.empty(ids.shape, dtype=np.int32)
    last = np.full((streams, num_experts + 1), -1, dtype=np.int32)
    rows = np.arange(streams)[None, :, None]
    size = max(1, BLOCK // (streams * (num_experts + 1)))
    for start in range(0, steps, size):
        block = ids[start : start + size]
        count = len(block)
        used = np.full((count + 1, streams, num_experts + 1), -1, dtype=np.int32)
        used[0] = last
        # Time of a use; places of one token are ordered as they are inserted.
        clock = ((start + np.arange(count)) * width)[:, None, None] + np.arange(width)
        used[np.arange(1, count + 1)[:, None, None], rows, block] = clock
        used[:, :, num_experts] = -1
        np.maximum.accumulate(used, axis=0, out=used)
        last = used[-1].copy()
        before = used[:-1]
        for place in range(width):
            chosen = block[:, :, place]
            own = np.take_along_axis(before, chosen[:, :, None], axis=2)
            distance = np.count_nonzero(before > own, axis=2).astype(np.int32)
            distance[own[:, :, 0] < 0] = num_experts
            distance[chosen == num_experts] = -1
            distances[start : start + count, :, place] = distance
    return distances


class _Cache:
    """Who is inside N caches of each of C capacities."""

    def __init__(self, streams: int, num_experts: int, capacities: Sequence[int]):
        self._slots = np.asarray(capacities)[:, None]
        self._filled = np.zeros((len(capacities), streams), dtype=np.int64)
        # One more column takes the writes for places without an expert, and stays False.
        self._inside = np.zeros((len(capacities), streams, num_experts + 1), dtype=bool)
        self._flat = self._inside.reshape(-1)
        starts = np.arange(len(capacities) * streams) * (num_experts + 1)
        self._starts = starts.reshape(len(capacities), streams)
        self._nobody = num_experts

    @property
    def room(self) -> NDArray[np.int64]:
        """Free slots of every cache, [C, N]."""
        return self._slots - self._filled

    def load_best(self, profile: NDArray[np.float64]) -> None:
        order = np.argsort(-profile, axis=1, kind="stable")
        for number, slots in enumerate(self._slots[:, 0]):
            best = order[:, :slots]
            np.put_along_axis(self._inside[number], best, True, axis=1)
            self._filled[number] = best.shape[1]

    def inside(self, ids: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of ids [N, K] every cache holds, [C, N, K]."""
        return self._flat[self._starts[:, :, None] + ids]

    def insert(
        self,
        ids: NDArray[np.intp],
        served: NDArray[np.float64],
        scores: NDArray[np.float64],
        *,
        hold: bool,
        only_better: bool,
    ) -> None:
        """Insert ids [N, K] one after another; their scores [N, K] then, all scores [N, E + 1]."""
        places = self._starts[:, :, None] + ids
        compared = np.where(self._inside, scores, np.inf)
        flat = compared.reshape(-1)
        if hold:
            flat[places] = np.inf
        for place in range(ids.shape[1]):
            target = places[:, :, place]
            outside = ~self._flat[target] & (ids[:, place] < self._nobody)
            if outside.any():
                full = self._filled >= self._slots
                victim = self._starts + compared.argmin(-1)
                lowest = flat[victim]
                enters = outside
                if only_better:
                    enters = outside & (~full | (served[:, place] > lowest))
                evicts = enters & full
                flat[victim] = np.where(evicts, np.inf, lowest)
                self._flat[victim] &= ~evicts
                self._flat[target] |= enters
                self._filled += enters & ~full
            if not hold:
                flat[target] = np.where(self._flat[target], served[:, place], np.inf)


def _checked(
    ids: NDArray[np.integer], num_experts: int, capacities: Sequence[int], hold: bool
) -> NDArray[np.intp]:
    if ids.ndim != 3:
        raise ValueError(f"ids are [tokens, streams, chosen], not of shape {ids.shape}")
    if not capacities or min(capacities) < 1:
        raise UserError(f"a cache has 1 slot or more, not {list(capacities)}")
    if hold and min(capacities) < ids.shape[2]:
        raise UserError(
            f"a token uses {ids.shape[2]} experts together; {min(capacities)} slots cannot hold "
            "them: use a capacity of that many or more"
        )
    if ids.size and not -1 <= ids.min() <= ids.max() < num_experts:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, with {num_experts} experts")
    return np.where(ids < 0, num_experts, ids).astype(np.intp)


def _scores(
    score: CacheScore,
    ids: NDArray[np.intp],
    num_experts: int,
    profile: NDArray[np.float64] | None,
    layers: int,
) -> ScoreState | _Foreknown:
    if score.future == "none":
        return ScoreState(score, ids.shape[1], num_experts, profile, layers=layers)
    return _Foreknown(score, ids, num_experts)


class _Foreknown:
    """What `ScoreState` is, for the scores that know the future."""

    def __init__(self, score: CacheScore, ids: NDArray[np.intp], num_experts: int):
        self.keys = np.zeros((ids.shape[1], num_experts + 1))
        self._score, self._ids = score, ids
        self._rows = np.arange(ids.shape[1])[:, None]
        self._served = self._by_window() if score.future == "window" else self._by_next_use()

    def use(self, time: float, ids: NDArray[np.intp], gains: object = None) -> NDArray[np.float64]:
        return next(self._served)

    def present(self, layer: int = 0) -> NDArray[np.float64]:
        return self.keys

    def _by_next_use(self) -> Iterator[NDArray[np.float64]]:
        for following in _next_uses(self._ids):
            yield -following.astype(np.float64)

    def _by_window(self) -> Iterator[NDArray[np.float64]]:
        width, window = self._ids.shape[2], self._score.window
        for step, uses in enumerate(_uses_within(self._ids, window)):
            entering = self._ids[:window] if step == 0 else self._ids[step + window - 1 :][:1]
            for row in entering:
                self.keys[self._rows, row] += CLOCK
            yield uses * CLOCK + (step * width + np.arange(width))


def _next_uses(ids: NDArray[np.intp]) -> NDArray[np.int64]:
    """The next access to the expert of every access, [T, N, K], counted in places; T K if none."""
    steps, streams, width = ids.shape
    following = np.empty(ids.shape, dtype=np.int64)
    for stream in range(streams):
        flat = ids[:, stream].reshape(-1)
        order = _stable_order(flat)
        same = flat[order[1:]] == flat[order[:-1]]
        column = np.full(flat.shape, steps * width, dtype=np.int64)
        column[order[:-1][same]] = order[1:][same]
        following[:, stream] = column.reshape(steps, width)
    return following


def _uses_within(ids: NDArray[np.intp], window: int) -> NDArray[np.int64]:
    """Uses of the expert of every access in the window - 1 tokens after it, [T, N, K]."""
    steps, streams, width = ids.shape
    counts = np.zeros(ids.shape, dtype=np.int64)
    for stream in range(streams):
        flat = ids[:, stream].reshape(-1)
        order = _stable_order(flat)
        # Accesses of one expert in order of time: those within the window are a range.
        span = np.int64(steps + window)
        time = flat[order] * span + order // width
        last = np.searchsorted(time, time + window - 1, side="right")
        column = np.empty(flat.shape, dtype=np.int64)
        column[order] = last - np.arange(len(flat)) - 1
        counts[:, stream] = column.reshape(steps, width)
    return counts


def _stable_order(flat: NDArray[np.intp]) -> NDArray[np.intp]:
    # Keys of 16 bits are sorted in linear time.
    small = flat.max(initial=0) <= np.iinfo(np.int16).max
    return np.argsort(flat.astype(np.int16) if small else flat, kind="stable")
