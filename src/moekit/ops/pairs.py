"""Pairs of a token and an expert, sorted by expert; in padded groups where a kernel wants them.

Letters: T tokens, E experts, N pairs, R = N plus padding rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of an expert are rounded up to so many where kernels are built for every matrix shape.
PAD = 32


@dataclass(frozen=True)
class Dispatch:
    """Where each pair lives among the padded rows.

    `row_of_pair` [N] gives the padded row of every pair, `pair_of_row` [R] the pair of every row
    (N for padding), and `ends` [E] the exclusive end of every expert's rows, as int32.
    """

    row_of_pair: Tensor
    pair_of_row: Tensor
    ends: Tensor


def sort_pairs(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs, whose experts are `expert` [N], by expert.

    Returns the pair in every place [N], stable, and how many pairs each expert has [E].
    """
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    return torch.argsort(expert, stable=True), counts


def dispatch_plan(expert: Tensor, num_experts: int, pad: int = PAD) -> Dispatch:
    """Lay the pairs, whose experts are `expert` [N], out in groups of whole `pad` rows.

    R is N + E*(pad-1) rounded up, whatever the routing, so that shapes stay static.
    """
    num_pairs = expert.numel()
    pair_of_sorted, counts = sort_pairs(expert, num_experts)
    padded = (counts + pad - 1) // pad * pad
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(num_pairs, device=expert.device)
    row_of_sorted = place + shift[expert[pair_of_sorted]]
    num_rows = -(-(num_pairs + num_experts * (pad - 1)) // pad) * pad
    pair_of_row = torch.full((num_rows,), num_pairs, dtype=torch.int64, device=expert.device)
    pair_of_row = pair_of_row.index_copy(0, row_of_sorted, pair_of_sorted)
    row_of_pair = torch.empty_like(expert).index_copy(0, pair_of_sorted, row_of_sorted)
    return Dispatch(row_of_pair, pair_of_row, ends.to(torch.int32))
