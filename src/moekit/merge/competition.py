"""Coefficients from what the task vectors say of each other: SCE, PCB, WIDEN, RAM.

Each takes the task vectors of one tensor as a stack [N, ...] and returns the mixed one. Shape
letters: N models, M entries, R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.merge.consensus import Consensus
from moekit.merge.magnitude import largest

ACTIVE = 1e-5


def sce(deltas: Tensor, select: float = 1.0, *, erase_from: str = "deltas") -> Tensor:
    """Select, calculate, erase (FuseChat, 2408.07990), deltas [N, ...].

    Entries whose variance over the models is among the share `select` of the highest decide the
    models' coefficients (their mean square); signs in the minority are erased. `erase_from`
    "deltas" also leaves out the entries that were not selected, as mergekit does; "weights" uses
    them for the coefficients alone, as the authors' code does.
    """
    chosen = deltas
    if select < 1:
        variance = deltas.var(dim=0, unbiased=False)
        count = int(select * int((variance > 0).sum()))
        if count == 0:
            return torch.zeros_like(deltas[0])
        mask = largest(lambda: iter([variance]), count, variance.numel()).keep(variance)
        chosen = deltas * mask
    share = square_shares(chosen)
    factors = share.view(-1, *[1] * (deltas.ndim - 1))
    merged = chosen if erase_from == "deltas" else deltas
    consensus = Consensus()
    mask_N = consensus.agreeing(merged, consensus.elect(merged)).to(deltas.dtype)
    divisor = (factors * mask_N).sum(0)
    if erase_from == "deltas":
        divisor = divisor.clamp(min=1e-6)
    else:
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return (factors * mask_N * merged).sum(0) / divisor


def square_shares(deltas: Tensor) -> Tensor:
    """Each task vector's mean square over the sum of all, [N] of deltas [N, ...]; even if none
    moved (FuseChat, 2408.07990)."""
    squares = deltas.square().flatten(1).mean(1)
    total = float(squares.sum())
    return squares / total if total >= 1e-6 else torch.full_like(squares, 1 / len(squares))


def pcb(
    deltas: Tensor,
    density: float = 0.1,
    scale: float = 1.2,
    *,
    clip: float = 1e-4,
    inter: str = "normalised",
) -> Tensor:
    """Parameter competition balancing (2410.02396) over deltas [N, M]; the mixed vector [M].

    `density` is the share of entries that stay; magnitudes are cut at the quantiles `clip` and
    1 - clip. `inter` "normalised" compares task vectors by their normalised magnitudes and does not
    depend on their scale; "raw" by their product with the sum, one of the two published forms.
    """
    magnitude, entries = deltas.abs(), deltas.shape[1]
    low = _ordered(magnitude, int(entries * clip))
    high = _ordered(magnitude, int(entries * (1 - clip) - 1))
    size = magnitude.clamp(low, high)
    clipped = deltas.sign() * size
    size = _to_unit(size)
    intra = torch.exp(len(deltas) * size.square())
    if inter == "raw":
        agreement = torch.tanh(deltas * deltas.sum(0))
    else:
        signed = clipped.sign() * size
        agreement = torch.stack([torch.tanh(one * signed).sum(0) for one in signed])
    balance = intra * agreement
    floor = _ordered(balance, int(entries * (1 - density)))
    balance = _to_unit(balance.clamp(min=floor))
    return scale * (clipped * balance).sum(0) / balance.sum(0).clamp(min=1e-12)


def widen(
    base: Tensor,
    tensors: Tensor,
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
    by_row: bool = False,
) -> Tensor:
    """WIDEN (2408.03092): each input column moves by how much it changed within its own model.

    base [R, C] or [M] and tensors [N, R, C] or [N, M]; the merged tensor. Significance is the rank
    of a column's change in norm and in direction among the model's columns; above `ratio` times the
    model's mean it gets the weight `calibration`, below it a softmax over the models. `by_row` is
    for embeddings, whose rows are the tokens.
    """
    deltas = tensors - base
    if base.ndim == 1:
        score = _scores(deltas.abs().float(), ratio, calibration)
        return base + (deltas * score.to(deltas.dtype)).sum(0)
    axis = -1 if by_row else -2
    norms = tensors.float().norm(dim=axis)
    norm = base.float().norm(dim=axis)
    cosine = (tensors.float() * base.float()).sum(axis) / (norms * norm).clamp(min=1e-12)
    size, turn = (norms - norm).abs(), 1 - cosine
    weight = _scores(_ranks(size), ratio, calibration) + _scores(_ranks(turn), ratio, calibration)
    weight = (weight / 2).unsqueeze(axis).to(deltas.dtype)
    return base + (deltas * weight).sum(0)


def ram(deltas: Tensor, *, gain: float = 0.0, limit: float = 0.2, active: float = ACTIVE) -> Tensor:
    """Unique changes whole, shared ones averaged (RAM, RAM+, 2601.13572), deltas [N, ...].

    Entries above `active` are changes. `gain` 0 is RAM; RAM+ takes 0.1: unique changes of model i
    are scaled by 1 + gain * clip(shared / unique entries of it, 0, limit).
    """
    changed = deltas.abs() > active
    count = changed.sum(0)
    alone = deltas * (changed & (count == 1))
    together = deltas * (changed & (count > 1)) / count.clamp(min=1)
    if gain:
        unique = (changed & (count == 1)).flatten(1).sum(1)
        shared = (changed & (count > 1)).flatten(1).sum(1)
        boost = 1 + gain * (shared / unique.clamp(min=1)).clamp(0, limit)
        alone = alone * boost.view(-1, *[1] * (deltas.ndim - 1))
    return (alone + together).sum(0)


def _ranks(values: Tensor) -> Tensor:
    """Rank over the last axis as a share from 0 to below 1; equal values in order."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], dtype=torch.float32) / values.shape[-1]
    return torch.empty_like(values).scatter_(-1, order, places.expand_as(values))


def _scores(significance: Tensor, ratio: float, calibration: float) -> Tensor:
    score = significance.softmax(dim=0)
    above = significance > ratio * significance.mean(dim=-1, keepdim=True)
    return torch.where(above, torch.full_like(score, calibration), score)


def _ordered(rows: Tensor, place: int) -> Tensor:
    """The entry at `place` of each row's sorted entries, [N, 1]."""
    place = min(max(place, 0), rows.shape[1] - 1)
    return rows.float().kthvalue(place + 1, dim=1, keepdim=True).values.to(rows.dtype)


def _to_unit(rows: Tensor) -> Tensor:
    """Each row between 0 and 1; a row of equal entries is all 1."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (rows - low) / span.clamp(min=1e-30), torch.ones_like(rows))
