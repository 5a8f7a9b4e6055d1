"""Low-rank factors of matrices: truncated SVD, plain or weighted by what the matrix is fed.

Shapes: O rows (outputs), D columns (inputs), R rank. A factorisation W = left right has left
[O, R] and right [R, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of the mean of the second moment's diagonal: makes directions that no input has solvable.
RIDGE = 1e-6


class Factors(NamedTuple):
    """left [O, R] and right [R, D] whose product stands for a matrix [O, D]."""

    left: Tensor
    right: Tensor

    def product(self) -> Tensor:
        return self.left @ self.right


class Whitener(NamedTuple):
    """S and its inverse [D, D] with S S^T the second moment of the inputs."""

    root: Tensor
    inverse: Tensor


def whitener(second: Tensor, ridge: float = RIDGE) -> Whitener:
    """The whitener of a second moment [D, D] of inputs, with `ridge` times its mean diagonal added.

    By eigenvalues rather than Cholesky, so that few tokens are no error. In float64. A moment of
    zeros gives the identity: nothing is known, so all directions count alike.
    """
    moment = (second.double() + second.double().T) / 2
    scale = moment.diagonal().mean()
    if scale <= 0:
        eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        return Whitener(eye, eye)
    values, vectors = torch.linalg.eigh(moment)
    roots = (values.clamp_min(0) + ridge * scale).sqrt()
    return Whitener(vectors * roots @ vectors.T, vectors / roots @ vectors.T)


class RowSpace(NamedTuple):
    """A space of R directions for the rows of matrices that read the same inputs.

    A matrix W [O, D] becomes (W `encode`) `decode`: encode [D, R] makes its private factor, decode
    [R, D] is what all matrices of the space share. `lost` is the sum of squares that the matrices
    it was made of lose, `total` what they had (of outputs on such inputs, where whitened).
    """

    encode: Tensor
    decode: Tensor
    lost: float
    total: float

    def factors(self, matrix: Tensor) -> Factors:
        return Factors(matrix.double() @ self.encode, self.decode)


def row_space(matrices: Tensor, rank: int, white: Whitener | None = None) -> RowSpace:
    """The row space of dimension R that loses least of the stacked `matrices` [O, D].

    Optimal in the Frobenius norm (Eckart-Young): `lost` is the sum of the squared singular values
    left out. With `white` optimal in the norm of the outputs. R beyond the rank of the stack is
    cut to it. Computed in float64. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1")
    values = matrices.double()
    if white is not None:
        values = values @ white.root
    _, singular, right = torch.linalg.svd(values, full_matrices=False)
    squares = singular.square()
    vectors = right[:rank].T
    encode, decode = vectors, vectors.T
    if white is not None:
        encode, decode = white.root @ vectors, vectors.T @ white.inverse
    return RowSpace(encode, decode, float(squares[rank:].sum()), float(squares.sum()))


def truncated(matrix: Tensor, rank: int, white: Whitener | None = None) -> Factors:
    """The best factors of rank R of one matrix [O, D], by SVD; see `row_space`."""
    return row_space(matrix, rank, white).factors(matrix)


def balanced(matrix: Tensor, rank: int) -> Factors:
    """The best factors of rank R of one matrix [O, D], each with the roots of the singular values.

    In float32, the precision of what is stored. Training moves both factors alike, which it does
    not where one of them is orthogonal. (FlexMoRE 2602.08818.)
    """
    left, singular, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    roots = singular[:rank].sqrt()
    return Factors(left[:, :rank] * roots, roots[:, None] * right[:rank])


def rank_for(squares: Tensor, keep: float) -> int:
    """The least rank whose singular values hold the share `keep` of the sum of `squares`.

    `squares` are squared singular values, largest first; at least 1.
    """
    wanted = keep * squares.sum()
    held = squares.cumsum(0)
    # Rounding of the sum must not ask for one direction more.
    return max(1, int((held < wanted * (1 - 1e-12)).sum()) + 1) if squares.sum() > 0 else 1
