"""NAEE: the subset of a layer's experts that reconstructs its output best.

Exact enumeration as in the paper; for layers with more experts than that allows, `descent`, which
is ours: take away the expert that is missed least until the count is right, then exchange kept for
dropped experts as long as that helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moekit.compress.prune.budget import Budget, SearchFile
from moekit.compress.prune.reconstruction import Reconstruction, reconstruction_of
from moekit.compress.prune.select import Room
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.view import MoEView

Progress = Callable[[float, int], None]


@dataclass(frozen=True)
class Found:
    """Kept experts by position, the error of each layer, and what the search spent.

    `complete` is False where a budget ended it; the sets are then the best found so far.
    """

    keep: list[list[int]]
    errors: list[float]
    evaluations: int
    complete: bool


@register(
    "search",
    "naee",
    title="The experts whose layer output comes nearest to that of all",
    paper="NAEE 2402.14800",
    needs=("weights", "data"),
    limits="Enumerates all subsets: 8 of 16 experts are 12,870 a layer, 16 of 32 are out of reach; "
    "how=descent goes on from there and finds a local optimum.",
    options={
        "how": "exact, or descent: drop the expert that is missed least, then exchange",
        "mode": "layerwise on the whole model's activations, or progressive on those of the pruned",
        "max_evaluations": "subsets that may be tried a layer",
        "max_seconds": "time for all layers together",
    },
)
def naee(
    view: MoEView,
    batches: Sequence[Batch | Tensor],
    rooms: Sequence[Room],
    *,
    how: Literal["exact", "descent"] = "exact",
    mode: Literal["layerwise", "progressive"] = "layerwise",
    max_evaluations: int = 20_000,
    max_seconds: float | None = None,
    state: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search, layer by layer, the set of `rooms[l].count` experts with the smallest error.

    `rooms` say how many experts each layer keeps and which it must. Finished layers are kept in
    the file `state`, from which a search of the same `identity` goes on. `progress` gets (layers
    done, all layers). Raises UserError where the subsets of a layer are more than
    `max_evaluations`, before anything is run.
    """
    if how == "exact":
        _check_size(view, rooms, max_evaluations)
    file = SearchFile(state, {"method": "naee", "how": how, "mode": mode, **(identity or {})})
    done: list[dict[str, Any]] = (file.load() or {"layers": []})["layers"]
    clock = Budget(seconds=max_seconds)
    evaluations = 0
    for position in range(len(done), len(view)):
        earlier = {p: rooms[p].gone(layer["keep"]) for p, layer in enumerate(done)}
        left = None if max_seconds is None else max(0.0, max_seconds - clock.elapsed)
        budget = Budget(max_evaluations, left)
        with _without(view, earlier if mode == "progressive" else {}):
            measured = reconstruction_of(view, batches, position)
            search = _enumerate if how == "exact" else _descend
            keep, error = search(measured, rooms[position], budget)
        evaluations += budget.spent
        done.append({"keep": keep, "error": error, "complete": not budget.exhausted})
        file.save({"layers": done})
        if progress is not None:
            progress(position + 1, len(view))
    return Found(
        [layer["keep"] for layer in done],
        [layer["error"] for layer in done],
        evaluations,
        all(layer["complete"] for layer in done),
    )


def _check_size(view: MoEView, rooms: Sequence[Room], limit: int) -> None:
    for layer, room in zip(view, rooms, strict=True):
        if room.subsets() > limit:
            raise UserError(
                f"{layer.name}: {room.subsets():,} subsets of {room.count} out of "
                f"{layer.num_experts} experts are more than max_evaluations {limit:,}; raise it or "
                "take how=descent."
            )


def _without(view: MoEView, gone: dict[int, list[int]]) -> AbstractContextManager[None]:
    return view.ban_experts(gone) if any(gone.values()) else nullcontext()


def _enumerate(measured: Reconstruction, room: Room, budget: Budget) -> tuple[list[int], float]:
    best: tuple[float, list[int]] = (math.inf, [])
    for keep in room.every_subset():
        # At least one is measured, so that there is an answer.
        if best[1] and budget.seconds is not None and budget.exhausted:
            break
        best = min(best, (_measure(measured, keep, budget), keep))
    return best[1], best[0]


def _descend(measured: Reconstruction, room: Room, budget: Budget) -> tuple[list[int], float]:
    keep = list(range(room.num_experts))
    ranked: list[int] = []
    while len(keep) > room.count:
        able = room.removable(keep)
        # The first order is always taken, so that there is an answer.
        if not ranked or not budget.exhausted:
            errors = {e: _measure(measured, [k for k in keep if k != e], budget) for e in able}
            ranked = sorted(errors, key=lambda e: errors[e])
        # Past the budget the last order decides.
        keep.remove(next(e for e in ranked if e in able))
    error = measured.error(keep)
    improved = True
    while improved and not budget.exhausted:
        improved = False
        for exchanged in room.exchanges(keep):
            if budget.exhausted:
                break
            found = _measure(measured, exchanged, budget)
            if found < error:
                keep, error, improved = exchanged, found, True
                break
    return keep, error


def _measure(measured: Reconstruction, keep: Sequence[int], budget: Budget) -> float:
    budget.spent += 1
    return measured.error(keep)
