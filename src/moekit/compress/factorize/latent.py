"""Experts as small private matrices times projections that a group of experts shares.

Shapes: D width, F expert width, Q experts of a group, R rank (of the shared projection).

    gate_e, up_e [F, D] = private_e [F, R] shared [R, D]        one `shared` each for gate and up
    down_e [D, F]       = shared [D, R] private_e [R, F]

Groups of one are plain low-rank factors of every matrix; a group of all experts is one basis for
the layer. (Mixture of Latent Experts 2503.23100.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekit.core.expert_weights import ExpertWeights
from moekit.ops.lowrank import Factors, RowSpace, Whitener, row_space, truncated

READING = ("gate", "up")


@dataclass(frozen=True)
class Shape:
    """What is factorised and how far: the settings that all methods of this room are rows of.

    `down` is "whole" (kept), "private" (its own factors [D, R] and [R, F]) or "shared" (one factor
    [D, R] for the group). `first_rank` truncates every matrix before the group's projection is
    taken, None leaves them.
    """

    rank: int
    down: str = "private"
    first_rank: int | None = None


@dataclass(frozen=True)
class GroupFactors:
    """The projections of one group: by matrix name the space its rows (of down: columns) keep."""

    shape: Shape
    spaces: dict[str, RowSpace]

    @property
    def lost(self) -> float:
        """Share of the squares of the factorised matrices (of their outputs, whitened) lost."""
        return sum(s.lost for s in self.spaces.values()) / max(
            sum(s.total for s in self.spaces.values()), 1e-300
        )

    def expand(self, expert: ExpertWeights, white: Whitener | None = None) -> ExpertWeights:
        """The expert with every factorised matrix multiplied out again, in its own dtype.

        `white` is that of the expert's own down inputs, for "private" ones.
        """
        made = {}
        for name, matrix in expert.tensors().items():
            factors = self.of(name, matrix, white)
            if factors is not None:
                product = factors.product()
                made[name] = (product.T if name == "down" else product).to(matrix.dtype)
        return replace(expert, **made)

    def of(self, name: str, matrix: Tensor, white: Whitener | None = None) -> Factors | None:
        """The factors of a matrix, of down those of its transpose; None for what stays whole."""
        if name in self.spaces:
            return self.spaces[name].factors(matrix.T if name == "down" else matrix)
        private = name == "down" and self.shape.down == "private"
        if private and smaller(self.shape.rank, *matrix.shape):
            own = truncated(matrix, self.shape.rank, white)
            return Factors(own.right.T, own.left.T)
        return None


def smaller(rank: int, rows: int, columns: int) -> bool:
    """Whether factors of this rank have fewer numbers than a matrix [rows, columns]."""
    return rank * (rows + columns) < rows * columns


def stored_parts(
    expert: ExpertWeights, factors: GroupFactors | None, white: Whitener | None = None
) -> dict[str, Tensor]:
    """The expert as its group's factors: NAME.left and NAME.right for each matrix that they make
    smaller (of down: its transpose), NAME for what stays whole, biases as they are."""
    found: dict[str, Tensor] = {}
    for name, part in expert.tensors().items():
        cut = None if factors is None else factors.of(name, part, white)
        if cut is None:
            found[name] = part
        else:
            found[f"{name}.left"], found[f"{name}.right"] = cut
    return found


def group_factors(
    experts: Sequence[ExpertWeights],
    shape: Shape,
    white: Whitener | None = None,
    white_down: Sequence[Whitener] | None = None,
) -> GroupFactors:
    """The projections that lose least of the group's matrices, in the Frobenius norm.

    With `white`, of the group's inputs, least of the outputs of gate and up; with `white_down`, of
    each expert's inputs of down, least of those of a shared down. A matrix that factors of the
    rank would not make smaller is left whole.
    """
    spaces = {}
    for name in READING:
        matrices = [getattr(expert, name) for expert in experts]
        if matrices[0] is None:
            continue
        rows = sum(len(matrix) for matrix in matrices)
        if smaller(shape.rank, rows, matrices[0].shape[1]):
            stacked = torch.cat([_reduced(m, shape.first_rank, white) for m in matrices])
            spaces[name] = row_space(stacked, shape.rank, white)
    if shape.down == "shared":
        width, inner = experts[0].down.shape
        if smaller(shape.rank, inner * len(experts), width):
            spaces["down"] = row_space(_columns(experts, shape, white_down), shape.rank)
    return GroupFactors(shape, spaces)


def _columns(
    experts: Sequence[ExpertWeights], shape: Shape, white: Sequence[Whitener] | None
) -> Tensor:
    """The columns of the group's down matrices as rows [Q F, D], weighed by what they are fed."""
    columns = []
    for number, expert in enumerate(experts):
        own = None if white is None else white[number]
        matrix = _reduced(expert.down, shape.first_rank, own)
        columns.append((matrix if own is None else matrix @ own.root).T)
    return torch.cat(columns)


def _reduced(matrix: Tensor, rank: int | None, white: Whitener | None) -> Tensor:
    if rank is None or rank >= min(matrix.shape):
        return matrix.double()
    return truncated(matrix, rank, white).product()


def stored_numbers(width: int, inner: int, experts: int, gated: bool, shape: Shape) -> int:
    """Numbers that a group of `experts` needs as factors, without biases.

    A matrix is counted whole where its factors would be no smaller.
    """
    whole = experts * width * inner
    shared = shape.rank * (experts * inner + width)
    total = (2 if gated else 1) * min(whole, shared)
    if shape.down == "whole":
        return total + whole
    private = experts * shape.rank * (width + inner)
    return total + min(whole, shared if shape.down == "shared" else private)


def rank_for_ratio(
    width: int, inner: int, experts: int, gated: bool, down: str, ratio: float
) -> int | None:
    """The largest rank at which a group needs at most 1 - `ratio` of its numbers; None for none."""
    whole = (3 if gated else 2) * experts * width * inner
    limit = (1 - ratio) * whole
    best = None
    for rank in range(1, width + experts * inner):
        if stored_numbers(width, inner, experts, gated, Shape(rank, down)) <= limit:
            best = rank
    return best
