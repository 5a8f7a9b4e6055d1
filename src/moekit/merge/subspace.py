"""Merging in singular subspaces: TSV-M and its weighted form, isotropic merging, KnOTS.

Each takes task vectors of one matrix [N, R, C] and returns the mixed one [R, C], in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Singular values below this share of the largest span directions that nothing was learnt in.
NUMERICAL_RANK = 1e-5


def tsv_merge(
    deltas: Tensor, *, weights: Sequence[float] | None = None, ranks: Sequence[int] | None = None
) -> Tensor:
    """Task singular vectors, decorrelated (TSV-M, 2412.00081).

    The leading min(R, C) / N directions of each task are put side by side and replaced by the
    nearest orthogonal ones. Directions beyond a task's numerical rank are left out: they carry
    nothing, but would bend those that do. `weights` and `ranks` by task make it the reweighted form
    (2502.06876).
    """
    count, rows, columns = deltas.shape
    room = min(rows, columns) // count
    if room == 0:
        return deltas.float().mean(0)
    lefts, values, rights = [], [], []
    for number, delta in enumerate(deltas.float()):
        left, value, right = torch.linalg.svd(delta, full_matrices=False)
        rank = int((value > NUMERICAL_RANK * value[0]).sum()) if float(value[0]) > 0 else 0
        keep = min(rank, room if ranks is None else min(ranks[number], room))
        factor = 1.0 if weights is None else weights[number]
        lefts.append(left[:, :keep])
        values.append(factor * value[:keep])
        rights.append(right[:keep])
    if not sum(len(value) for value in values):
        return torch.zeros(rows, columns)
    left, right = _polar(torch.cat(lefts, 1)), _polar(torch.cat(rights).T).T
    return (left * torch.cat(values)) @ right


def isotropic(deltas: Tensor, *, common: float = 1.0) -> Tensor:
    """The summed task vectors with all singular values set to their mean (Iso-C).

    With `common` below 1 (Iso-CTS, 2502.04959) that share of the directions is the sum's, and the
    rest are the leading directions of each task outside of it.
    """
    count, rows, _ = deltas.shape
    total = deltas.float().sum(0)
    left, value, right = torch.linalg.svd(total, full_matrices=False)
    room = (len(value) - round(common * len(value))) // count if common < 1 else 0
    if room == 0:
        return value.mean() * left @ right
    kept = len(value) - room * count
    lefts, values, rights = [left[:, :kept]], [value[:kept]], [right[:kept]]
    outside = torch.eye(rows) - lefts[0] @ lefts[0].T
    for delta in deltas.float():
        own_left, own_value, own_right = torch.linalg.svd(outside @ delta, full_matrices=False)
        lefts.append(own_left[:, :room])
        values.append(own_value[:room])
        rights.append(own_right[:room])
    mean = torch.cat(values).mean()
    return mean * _polar(torch.cat(lefts, 1)) @ _polar(torch.cat(rights).T).T


def knots(deltas: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """Another merge in the basis that all tasks share (KnOTS, 2410.19735).

    The task vectors side by side, [R, N * C], have one basis of columns; `merge` gets the tasks'
    coordinates in it [N, rank, C] and returns mixed ones [rank, C].
    """
    count, _, columns = deltas.shape
    wide = torch.cat(list(deltas.float()), dim=1)
    left, value, right = torch.linalg.svd(wide, full_matrices=False)
    keep = value > NUMERICAL_RANK * value[0]
    coordinates = (value[keep, None] * right[keep]).view(-1, count, columns).transpose(0, 1)
    return left[:, keep] @ merge(coordinates.contiguous())


def outlier_weights(deltas: Tensor) -> list[float]:
    """Weights by how much of a task vector lies beyond three deviations; their mean is 1.

    2502.06876 says that such outliers decide, not how much: the formula is this package's.
    """
    sizes = deltas.float().abs().flatten(1)
    bound = sizes.mean(1, keepdim=True) + 3 * sizes.std(1, keepdim=True)
    mass = (sizes * (sizes > bound)).sum(1) / sizes.sum(1).clamp(min=1e-30)
    total = float(mass.sum())
    count = len(deltas)
    return [1.0] * count if total == 0 else [float(m) * count / total for m in mass]


def sparsity_ranks(deltas: Tensor) -> list[int]:
    """Fewer directions for a task whose vector is sparse (2502.06876; the formula is our own)."""
    count, rows, columns = deltas.shape
    sizes = deltas.float().abs().flatten(1)
    dense = (sizes > sizes.mean(1, keepdim=True)).float().mean(1)
    room = min(rows, columns) / count
    return [max(1, round(min(1.0, 2 * float(share)) * room)) for share in dense]


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
