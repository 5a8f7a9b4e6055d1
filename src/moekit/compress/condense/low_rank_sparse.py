"""A matrix as low rank plus a residue of few rows (MC-SMoE). O rows, D columns, R rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moekit.core.expert_weights import ExpertWeights
from moekit.ops.lowrank import Factors, truncated

MATRICES = ("gate", "up", "down")


def split(matrix: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """W [O, D] as factors U [O, R], V [R, D] and a residue S = W - U V, all in float64.

    The singular values are shared evenly by U and V.
    """
    plain = truncated(matrix, rank)
    roots = plain.left.norm(dim=0).sqrt().clamp_min(1e-12)
    factors = Factors(plain.left / roots, plain.right * roots[:, None])
    return factors, matrix.double() - factors.product()


def low_rank_sparse(
    expert: ExpertWeights, rank: int, keep: float, information: ExpertWeights | None = None
) -> ExpertWeights:
    """The expert with every matrix as low rank plus the best rows of its residue.

    `keep` is the share of rows, one threshold over the matrices of the expert. A row counts by the
    mean of |s| over its entries, or with `information` (squared gradients) of |s| times their root,
    which is MC-SMoE's |s * gradient| for the residue. 1 keeps the expert as it is.
    """
    if keep >= 1:
        return expert
    residues, factors, scores = {}, {}, {}
    for name in MATRICES:
        matrix = getattr(expert, name)
        if matrix is None:
            continue
        factors[name], residues[name] = split(matrix, rank)
        value = residues[name].abs()
        if information is not None:
            value = value * getattr(information, name).double().clamp_min(0).sqrt()
        scores[name] = value.mean(1)
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: round(keep * len(order))]] = True
    made = {}
    for name, rows in zip(scores, chosen.split([len(s) for s in scores.values()]), strict=True):
        kept = residues[name] * rows[:, None]
        made[name] = (factors[name].product() + kept).to(getattr(expert, name).dtype)
    return replace(expert, **made)


def stored_share(rows: int, columns: int, rank: int, keep: float) -> float:
    """Numbers of U, V and the kept rows of S over those of a matrix [rows, columns]."""
    return (rank * (rows + columns) + keep * rows * columns) / (rows * columns)
