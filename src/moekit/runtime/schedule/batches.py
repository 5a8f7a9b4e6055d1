"""Forming batches of requests that need the same experts, from what is predicted of them.

Shapes: N requests, L MoE layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register

ROUNDS = 30
LENGTH_WEIGHT = 1.5


@register(
    "scheduler",
    "fullest-expert-first",
    title="Batches from the queue of the expert that most requests wait for",
    paper="Read-ME 2410.19123",
    lossless=True,
    limits="For requests that need one expert each. A rare expert waits while others are fuller.",
)
def fullest_expert_first(experts: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of request numbers; `experts` [N] is what each request needs next.

    The fullest queue is emptied into the batch, then the next, until it holds `batch_size`. Equal
    queues go by their oldest request. Raises UserError for a batch below 1.
    """
    _check_size(batch_size)
    queues: dict[int, deque[int]] = defaultdict(deque)
    for request, expert in enumerate(experts):
        queues[expert].append(request)
    batches: list[list[int]] = []
    room = 0
    while queues:
        fullest = max(queues, key=lambda expert: (len(queues[expert]), -queues[expert][0]))
        while queues[fullest]:
            if not room:
                batches.append([])
                room = batch_size
            batches[-1].append(queues[fullest].popleft())
            room -= 1
        del queues[fullest]
    return batches


@register(
    "scheduler",
    "expertflow-batches",
    title="Batches of requests with alike predicted paths, by balanced k-medoids",
    paper="ExpertFlow 2410.17954",
    lossless=True,
    limits="Starts from requests that are far apart, not from random ones.",
)
def balanced_groups(
    paths: NDArray[np.bool_],
    batch_size: int,
    lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Batches of at most `batch_size` request numbers whose `paths` [N, L, E] are alike.

    Two paths are as alike as the share of cells in which they agree, plus 1.5 times that of the
    shorter length in the longer one where `lengths` [N] are given. Raises UserError for a batch
    below 1.
    """
    _check_size(batch_size)
    count = len(paths)
    groups = -(-count // batch_size)
    if groups < 2:
        return [list(range(count))] if count else []
    alike = _similarity(paths, lengths)
    centres = _far_apart(alike, groups)
    member = np.zeros(count, dtype=np.intp)
    for _ in range(ROUNDS):
        member = _assign(alike[:, centres], batch_size)
        moved = np.array([_medoid(alike, np.flatnonzero(member == g)) for g in range(groups)])
        if (moved == centres).all():
            break
        centres = moved
    return [np.flatnonzero(member == group).tolist() for group in range(groups)]


def missing_experts(paths: NDArray[np.bool_], batches: Sequence[Sequence[int]], slots: int) -> int:
    """Distinct experts beyond the `slots` of a layer, over all layers and batches: what a grouping
    costs (ExpertFlow)."""
    distinct = [paths[list(batch)].any(0).sum(-1) for batch in batches]
    return int(sum(np.maximum(0, layers - slots).sum() for layers in distinct))


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"a batch has 1 request or more, not {batch_size}")


def _similarity(paths: NDArray[np.bool_], lengths: Sequence[int] | None) -> NDArray[np.float64]:
    flat = paths.reshape(len(paths), -1).astype(np.float64)
    both = flat @ flat.T
    ones = flat.sum(1)
    alike = 1 - (ones[:, None] + ones[None, :] - 2 * both) / flat.shape[1]
    if lengths is not None:
        sizes = np.asarray(lengths, dtype=np.float64)
        shorter, longer = np.minimum.outer(sizes, sizes), np.maximum.outer(sizes, sizes)
        alike = alike + LENGTH_WEIGHT * shorter / np.maximum(longer, 1)
    return alike


def _far_apart(alike: NDArray[np.float64], groups: int) -> NDArray[np.intp]:
    """First centres [G]: each the request least like those before it, so that none coincide."""
    centres = [0]
    nearest = alike[0].copy()
    for _ in range(groups - 1):
        nearest[centres] = np.inf
        centres.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, alike[centres[-1]])
    return np.array(centres)


def _assign(alike: NDArray[np.float64], size: int) -> NDArray[np.intp]:
    """The group of every request [N], at most `size` in each; those with most to lose first.

    What a request loses is the difference between its best and its second-best group.
    """
    ordered = np.sort(alike, axis=1)
    member = np.full(len(alike), -1, dtype=np.intp)
    room = np.full(alike.shape[1], size)
    for request in np.argsort(ordered[:, -2] - ordered[:, -1], kind="stable"):
        open_groups = np.where(room > 0, alike[request], -np.inf)
        member[request] = open_groups.argmax()
        room[member[request]] -= 1
    return member


def _medoid(alike: NDArray[np.float64], members: NDArray[np.intp]) -> int:
    return int(members[alike[np.ix_(members, members)].sum(1).argmax()])
