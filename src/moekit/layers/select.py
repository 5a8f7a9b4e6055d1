"""Rules of selection: parts `select(selection [U, E], context) -> Choice`."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import RouterContext
from .router import Choice
from .terms import NEVER


def dense_choice(ids: Tensor) -> Choice:
    """The choice of `ids` [U, K], best first."""
    units, top_k = ids.shape
    unit = torch.arange(units, device=ids.device).repeat_interleave(top_k)
    return Choice(unit, ids.reshape(-1), top_k)


def ragged_choice(chosen: Tensor, selection: Tensor) -> Choice:
    """The choice of a mask `chosen` [U, E], ordered by `selection` within every unit."""
    order = selection.masked_fill(~chosen, NEVER).argsort(dim=-1, descending=True, stable=True)
    unit, place = chosen.gather(-1, order).nonzero(as_tuple=True)
    return Choice(unit, order[unit, place])


class TopK:
    """The best `top_k` experts of every unit."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        return dense_choice(selection.topk(self.top_k, dim=-1).indices)


class TopP:
    """As many experts as it takes for their scores to sum above `threshold`, at most `limit`.

    Harder Tasks Need More Experts, arXiv 2403.07652.
    """

    def __init__(self, threshold: float, limit: int) -> None:
        self.threshold, self.limit = threshold, limit

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        best, order = selection.sort(dim=-1, descending=True, stable=True)
        before = best.cumsum(-1) - best
        taken = before <= self.threshold
        # Rounding of the sum must never leave a unit without its first expert.
        taken[:, 0] = True
        taken[:, self.limit :] = False
        unit, place = taken.nonzero(as_tuple=True)
        return Choice(unit, order[unit, place])


class GroupQuota:
    """The same number of experts, `top_k` / `groups`, in each of `groups` equal groups.

    Mixture of Grouped Experts, arXiv 2505.21411.
    """

    def __init__(self, top_k: int, groups: int) -> None:
        self.top_k, self.groups = top_k, groups

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        grouped = selection.unflatten(-1, (self.groups, -1))
        best = grouped.topk(self.top_k // self.groups, dim=-1).indices
        first = torch.arange(self.groups, device=selection.device) * grouped.shape[-1]
        ids = (best + first[:, None]).flatten(-2)
        order = selection.gather(-1, ids).argsort(dim=-1, descending=True, stable=True)
        return dense_choice(ids.gather(-1, order))


class ExpertChoice:
    """Every expert takes the units it likes best, `per_unit` experts a unit on average.

    Expert Choice, arXiv 2202.09368. Each expert takes U * `per_unit` / E units of the whole batch,
    or of every sequence with `within` "sequence". Padding is never taken. With a `cap` no unit is
    taken by more than so many experts; the paper rounds a linear programme, here experts who are
    refused take their next best, which holds the bound exactly.
    """

    causal = False

    def __init__(self, per_unit: float, *, within: str = "batch", cap: int | None = None) -> None:
        self.per_unit, self.cap = per_unit, cap
        self.sees_batch = within == "batch"

    def __call__(self, selection: Tensor, context: RouterContext) -> Choice:
        units, experts = selection.shape
        pools = 1 if self.sees_batch else context.batch
        real = context.token_mask
        if real is not None and len(real) == units:
            selection = selection.masked_fill(~real[:, None], NEVER)
        columns = selection.view(pools, units // pools, experts)
        size = columns.shape[1]
        take = min(size, max(1, int(size * self.per_unit / experts)))
        chosen = taken_units(columns.detach(), take, self.cap)
        return ragged_choice(chosen.view(units, experts), selection)


@torch.no_grad()
def taken_units(scores: Tensor, take: int, cap: int | None = None) -> Tensor:
    """Which units each expert takes: a mask [P, U, E] for `scores` [P, U, E] of P pools.

    Each expert gets the `take` best of its column. With a `cap` a unit that is wanted by more
    experts keeps those that score it highest, and the others turn to their next best units until
    nobody is refused (deferred acceptance). Scores of minus infinity are never taken.
    """
    scores = scores.clone()
    while True:
        best, rows = scores.topk(take, dim=1)
        wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, rows, best > NEVER)
        if cap is None or cap >= scores.shape[2]:
            return wanted
        offers = scores.masked_fill(~wanted, NEVER)
        kept = torch.zeros_like(wanted).scatter_(2, offers.topk(cap, dim=2).indices, True)
        refused = wanted & ~kept
        if not refused.any():
            return wanted
        scores[refused] = NEVER
